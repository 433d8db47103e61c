"""Automata of rules accept the completions that the rules say, and no others: all of a few tokens are enumerated."""

import json
import re
import sys
from itertools import product

import jsonschema
import pytest
from hypothesis import given, settings, strategies as st
from tiny_models import llama_decoder, make_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from tokenrl.errors import Refused
from tokenrl.language.policy.automata import Automaton, automaton_of
from tokenrl.language.policy.stops import decoded, special_tokens
from tokenrl.language.rollout.distribution import text_of_rule
from toy_tasks.models import literal_tokenizer

PLAIN = literal_tokenizer(["a", "b", "c", "ab"])
PIECES = ["<unk>", "<s>", "</s>", "<0xC3>", "<0xA9>", "▁", "a", "▁a", "b", "▁▁"]


def pieces(decoder):
    """A tokenizer of pieces that begin with a space, and of two bytes, which make é together."""
    vocabulary = {name: i for i, name in enumerate(PIECES)}
    backend = Tokenizer(
        models.BPE(vocabulary, [("▁", "a"), ("▁", "▁")], unk_token="<unk>", byte_fallback=True)
    )
    backend.decoder = decoder
    both = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(both)
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


LLAMA = pieces(llama_decoder())
METASPACE = pieces(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]))


def compiled(rule, tokenizer=PLAIN):
    rule = rule if isinstance(rule, list) else text_of_rule(rule)
    return automaton_of(rule, tokenizer, (tokenizer.eos_token_id,))


def completions(tokenizer, length):
    """All sequences of tokens that are not special, and their texts as rewards get them."""
    ids = sorted({*tokenizer.get_vocab().values()} - {*special_tokens(tokenizer)})
    rows = [row for n in range(length + 1) for row in product(ids, repeat=n)]
    return dict(zip(rows, decoded(tokenizer, rows), strict=True))


def ends(automaton, length):
    """The sequences of at most `length` tokens that an automaton accepts."""
    moves = [
        {token: target for ids, target in row.items() for token in ids} for row in automaton.edges
    ]
    states = {(): 0}
    rows = [()]
    for row in rows:
        for token, target in moves[states[row]].items() if len(row) < length else ():
            states[(*row, token)] = target
            rows.append((*row, token))
    assert len(rows) == len({*rows})  # no token leads to two states
    return {row for row in rows if states[row] in automaton.accepting}


def check_pattern(pattern, tokenizer, length):
    texts = completions(tokenizer, length)
    right = {
        row for row, text in texts.items() if re.fullmatch(pattern, text) and "\ufffd" not in text
    }
    assert ends(compiled(pattern, tokenizer), length) == right


@pytest.mark.parametrize(
    "pattern",
    [
        "a|ab",
        "a*",
        "(ab|b)*c{2}",
        "^a|bc$",
        "",
        "(a|b){2,3}?c??",
        "[^c]{0,4}",
        "a[ab]{2}c",
        "(?i)A(b|bc|)",
    ],
)
def test_regular_expressions(pattern):
    check_pattern(pattern, PLAIN, 6)


REGEXES = st.recursive(
    st.sampled_from(["a", "b", "c", "[ab]", ".", ""]),
    lambda parts: st.one_of(
        st.tuples(parts, parts).map("".join),
        st.tuples(parts, parts).map("({0[0]}|{0[1]})".format),
        st.tuples(parts, st.sampled_from(["*", "?", "+", "{2}", "{0,2}", "*?"])).map(
            "({0[0]}){0[1]}".format
        ),
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(REGEXES)
def test_any_regular_expression(pattern):
    check_pattern(pattern, PLAIN, 4)


@pytest.mark.parametrize("pattern", [".{0,4}", "[^a]?é+", " a.*", "( |a|é)*b", " *", "é"])
@pytest.mark.parametrize("tokenizer", [LLAMA, METASPACE], ids=["llama", "metaspace"])
def test_pieces_with_bytes(pattern, tokenizer):
    check_pattern(pattern, tokenizer, 4)


@pytest.mark.parametrize("pattern", ["[^a]?é?.", "(the|😀| )*", "."])
def test_bytes(pattern):
    tokenizer = make_tokenizer()
    check_pattern(pattern, tokenizer, 2)
    accepted = ends(compiled("(😀|naïve){2}", tokenizer), 11)
    assert decoded(tokenizer, [*accepted][:1])[0] in ("😀😀", "😀naïve", "naïve😀", "naïvenaïve")
    assert any(len(row) > 5 for row in accepted)


def test_long_counts_are_read_at_once():
    assert compiled(".{0,99}").accepting


SCHEMA = {
    "type": "object",
    "properties": {"x": {"type": ["integer", "number"]}, "y": {"enum": [1, 11]}},
    "required": ["x"],
}


def test_schemas(tmp_path):
    tokenizer = literal_tokenizer(['{"x":', '"y":', "1", ".", ",", "}"])
    right = set()
    for row, text in completions(tokenizer, 6).items():
        try:
            jsonschema.validate(json.loads(text), SCHEMA)
        except (ValueError, jsonschema.ValidationError):
            continue
        if text.count('"x"') == 1 and text.find('"x"') <= text.find('"y"') % 99:
            right.add(row)
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA, indent=1))
    for rule in (SCHEMA, json.dumps(SCHEMA), str(path)):
        assert ends(compiled(rule, tokenizer), 6) == right
    assert any(len(row) == 6 for row in right)


@pytest.mark.parametrize("choices", [["a", "ab", "abc", "a"], ["", "cc"]])
def test_choices(choices):
    tokens = {row: text for row, text in completions(PLAIN, 6).items() if text in choices}
    written = {row for row, text in tokens.items() if list(row) == PLAIN(text).input_ids}
    assert ends(compiled(choices), 6) == written
    assert len(written) == len(set(choices))


def test_choices_are_written_as_demonstrations_are():
    rows = ends(compiled(["a", " a", "b"], LLAMA), 4)
    names = {tuple(PIECES[i] for i in row) for row in rows}
    assert names == {("a",), ("▁", "▁a"), ("b",)}


def test_automata():
    counter = [
        {"a": 1},
        {"a": 2, "b": 0},
        {"b": 1},
    ]  # a is opened and b closes it, at most two deep
    depths = {(): 0}
    for row in completions(PLAIN, 6):
        if row and row[:-1] in depths and row[-1] in (2, 3):
            depth = depths[row[:-1]] + (1 if row[-1] == 2 else -1)
            if 0 <= depth <= 2:
                depths[row] = depth
    automaton = compiled(Automaton(counter, [0]))
    assert ends(automaton, 6) == {row for row, depth in depths.items() if depth == 0}
    by_ids = [{2: 1}, {2: 2, "b": 0}, {3: 1}]
    assert compiled(Automaton(by_ids, {0})) == automaton


def edge(*rows, accepting=(0,)):
    return Automaton(rows, accepting)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (["a", "x"], "cannot write 'x'"),
        (["a<eos>"], "without special ones"),
        (5, "it must be a regular expression"),
        ("[a", "cannot be read"),
        ("(?=a)b", "without looking ahead"),
        ({"type": "word"}, "Unsupported type: word"),
        ({"type": "integer", "minimum": 3}, "cannot be held to minimum"),
        ({"properties": {"a": {"not": {}}}, "required": ["b"]}, "cannot be held to b, not"),
        ({"anyOf": [{"type": "array", "items": {"multipleOf": 2}}]}, "multipleOf"),
        (edge({"ba": 0}), r"'ba' as one token: its tokens are \['b', 'a'\]"),
        (edge({"é": 0}), "cannot write 'é'"),
        (edge({0: 0}), "the token 0"),
        (edge({99: 0}), "the token 99"),
        (edge({"a": 1}), r"has 1 states, and \[1\] are none"),
        (edge({"a": 0}, accepting=()), "no way to an accepting"),
        (edge({"a": 0}, accepting=[1]), r"\[1\] are none"),
        (edge({"a": 1, "b": 0}, {"a": 1}), r"\[1\] are none of them or have no way"),
        (edge({"a": 0}, {}, accepting=[1]), r"\[0\]"),
    ],
)
def test_refused(rule, words):
    with pytest.raises(Refused, match=words):
        compiled(rule)


def test_tokenizers_that_put_spaces_between_words_are_refused():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2})), eos_token="</s>"
    )
    with pytest.raises(Refused, match="spaces between words"):
        compiled("a", tokenizer)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "outlines_core", None)
    with pytest.raises(Refused, match=r"pip install 'tokenrl-lm\[allowed\]'"):
        compiled("abcabc")


@pytest.mark.parametrize("content", ["[1]", "{"])
def test_files_of_schemas(content, tmp_path):
    path = tmp_path / "rule.json"
    path.write_text(content)
    with pytest.raises(Refused, match=path.name):
        text_of_rule(str(path))
    assert text_of_rule("[0-9]+") == "[0-9]+"
