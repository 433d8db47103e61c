"""Draws what a comparison found: one page that needs no other file and no network."""
