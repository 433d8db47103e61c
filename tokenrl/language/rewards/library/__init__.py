"""A library of common rewards, which can be named on the command line.

Each class makes a reward with TRL's signature, for text and for chat messages. On the command line it has its
name in `LIBRARY`, and its fields are the options: `--reward numeric_answer "length(target=20)"`. Text that a
model wrote is parsed, and never evaluated as code.
"""

from typing import Any

from tokenrl.language.rewards.library.answers import ExactMatch, NumericAnswer
from tokenrl.language.rewards.library.texts import Length, RegexFormat, Repetition, Sentiment, ValidJson

LIBRARY: dict[str, Any] = {
    "exact_match": ExactMatch,
    "numeric_answer": NumericAnswer,
    "regex_format": RegexFormat,
    "length": Length,
    "repetition": Repetition,
    "valid_json": ValidJson,
    "sentiment": Sentiment,
}
