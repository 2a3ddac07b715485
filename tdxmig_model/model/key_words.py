"""The model of key words: MIG_DEC_KEY is written word by word, and a session may start in between.

A MigTD writes the words of one key in order and does not go back to a key that it left; it may be
stopped after any word, and begin another key at any time.  A word is known by the key that it is
of.  Any number of words is as good as the four of the TDX module.
"""

from __future__ import annotations

from tdxmig_model.expr import (
    BOOL,
    INT,
    Goal,
    Property,
    Size,
    System,
    all_of,
    any_of,
    count,
    forall,
    implies,
    index,
    mapping,
    need,
    not_,
    only,
    param,
    scalar,
    step,
)
from tdxmig_model.model.words import ALL_PROFILES, MODULE, NETWORK, SOURCE, repaired

KEY = index("Key")
WORD = index("Word")

writing = scalar("key_being_written", INT, 0, NETWORK, doc="what the MigTD writes")
next_word = scalar("next_word", INT, 0, NETWORK, doc="which word it writes next")
word = mapping("mig_dec_key_word", (WORD,), INT, 0, SOURCE, doc="a word of MIG_DEC_KEY, by its key")
written = mapping("word_written", (WORD,), BOOL, False, SOURCE, doc="written since the last use")
key_set = scalar("dec_key_set", BOOL, False, SOURCE, doc="MIG_DEC_KEY_SET")
in_session = scalar("in_session", BOOL, False, SOURCE, ghost=True)
working_word = mapping(
    "mig_dec_working_key_word", (WORD,), INT, 0, SOURCE, ghost=True, doc="MIG_DEC_WORKING_KEY"
)
words_written = count("words written", WORD, lambda w: written[w])

k = param("k", KEY)
w = param("w", WORD)
_WRITE = f"TDG.SERVTD.WR of MIG_DEC_KEY, TDCALL 20; {MODULE}"

STEPS = (
    step(
        "begin_key",
        NETWORK,
        (k,),
        when=(need("another_key", writing.ne(k)),),
        then=(writing.to(k), next_word.to(0)),
        why="The MigTD begins to write a key; what it wrote before may be unfinished.",
        cite=_WRITE,
    ),
    step(
        "write_word",
        SOURCE,
        (w,),
        when=(need("in_order", next_word.eq(w)),),
        then=(
            next_word.to(w + 1),
            word[w].to(writing),
            key_set.to(True),
            only(
                repaired("R7"),
                written.fill(lambda i: any_of(i.eq(w), all_of(written[i], not_(written[w])))),
            ),
        ),
        why="One word changes; a word that was written already begins a new key.",
        cite=_WRITE,
    ),
    step(
        "use_key",
        SOURCE,
        when=(
            need("mig_dec_key_set", key_set),
            need("whole_key", words_written.eq(Size(WORD)), *repaired("R7")),
        ),
        then=(
            key_set.to(False),
            in_session.to(True),
            working_word.fill(lambda i: word[i]),
            only(repaired("R7"), written.fill(lambda i: False)),
        ),
        why="A session, of export or import, takes the key and consumes it.",
        cite=f"TDH.EXPORT.STATE.IMMUTABLE, leaf 72; {MODULE}; TDH.IMPORT.STATE.IMMUTABLE, leaf 85",
    ),
)

PROPERTIES = (
    Property(
        "P31",
        implies(
            in_session,
            forall(
                {"a": WORD, "b": WORD},
                lambda a, b: working_word[a].eq(working_word[b]),
                lambda a, b: (working_word[a], working_word[b]),
            ),
        ),
        "A decryption key is one 256-bit value that was written, never a mixture.",
        "leaf",
        "TDG.SERVTD.WR of MIG_DEC_KEY, MIG_DEC_KEY_SET",
        guards=(("use_key", "whole_key"),),
        witness=all_of(in_session, working_word[0].ne(0)),
    ),
    Property(
        "words_in_order",
        all_of(
            next_word.ge(0),
            forall(
                {"i": WORD},
                lambda i: implies(all_of(i.lt(next_word), next_word.lt(Size(WORD))), written[i]),
                lambda i: (written[i],),
            ),
            forall(
                {"i": WORD},
                lambda i: implies(
                    written[i],
                    all_of(
                        written[0],
                        any_of(next_word.eq(0), all_of(i.lt(next_word), word[i].eq(writing))),
                    ),
                ),
                lambda i: (written[i],),
            ),
            forall(
                {"a": WORD, "b": WORD},
                lambda a, b: implies(all_of(written[a], written[b]), word[a].eq(word[b])),
                lambda a, b: (written[a], written[b], word[a], word[b]),
            ),
            implies(all_of(next_word.gt(0), next_word.lt(Size(WORD))), not_(written[next_word])),
        ),
        "The words that count as written are the first ones, and of one key.",
        "lemma",
    ),
)

KEY_WORDS = System(
    name="key_words",
    variables=(writing, next_word, word, written, key_set, in_session, working_word),
    steps=STEPS,
    properties=PROPERTIES,
    goals=(
        Goal(
            "second_key",
            all_of(in_session, working_word[0].ne(0), writing.ne(working_word[0])),
            "After a session another key is begun.",
        ),
    ),
    assumptions=(
        "a MigTD writes the words of one key in order and does not go back to a key that it left",
        "each word is written whole; the TDX module counts no word that is written with a mask",
    ),
    profiles=ALL_PROFILES,
)
