"""Rung 2: subtract a running mean of past rewards. A_i = R_i - b, then b <- 0.9 b + 0.1 mean(R).

Changed: the baseline. Wrong answers are now pushed down, and right ones up only as far as they beat what is
usual. b is read before this step's rewards enter it, so no reward is in its own baseline: still exact.
Expect: a smaller gradient norm than rung 1, for there is less noise in it, and more so as rewards near 1.
"""
