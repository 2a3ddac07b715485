"""Formulas that the properties and the lemmas of the memory model share."""

from __future__ import annotations

from collections.abc import Callable

from tdxmig_model.expr import (
    Bound,
    Node,
    all_of,
    any_of,
    forall,
    implies,
)
from tdxmig_model.model import destination as d
from tdxmig_model.model import memory_state as x
from tdxmig_model.model import network as n
from tdxmig_model.model import source_state as s
from tdxmig_model.model.words import (
    CANCEL,
    ENTRY,
    EXPORTED_BLOCKEDW,
    LIVE_EXPORT,
    MEM,
    MEMORY_IMPORT,
    MESSAGE,
    NOP,
    PAGE,
    PAUSED_EXPORT,
    PENDING_EXPORTED_BLOCKEDW,
    POST_EXPORT,
    STATE_IMPORT,
    STREAM,
)

in_order = d.op_state.in_(MEMORY_IMPORT, STATE_IMPORT)
after_start = d.op_state.in_(*d.AFTER_START)
in_session = d.op_state.in_(MEMORY_IMPORT, STATE_IMPORT, *d.AFTER_START)
before_start = all_of(n.observed, s.op_state.in_(LIVE_EXPORT, PAUSED_EXPORT))
blackout = s.op_state.in_(PAUSED_EXPORT, POST_EXPORT)
given_up = all_of(n.observed, s.op_state.eq(POST_EXPORT))


def pages(body: Callable[[Bound], Node], *triggers: Callable[[Bound], Node]) -> Node:
    """For every page."""
    return forall({"p": PAGE}, body, lambda p: tuple(t(p) for t in triggers))


def bundles(body: Callable[[Bound], Node]) -> Node:
    """For every bundle of the log."""
    return forall(
        {"m": MESSAGE},
        lambda m: implies(all_of(m.ge(0), m.lt(n.log_length)), body(m)),
        lambda m: (n.log_kind[m], d.accepted[m]),
    )


def streams(body: Callable[[Bound, Node], Node]) -> Node:
    """For every stream on which an import is under way in a session, with its bundle."""
    return forall(
        {"i": STREAM},
        lambda i: implies(all_of(in_session, d.unfinished[i]), body(i, d.unfinished_bundle[i])),
        lambda i: (d.unfinished[i],),
    )


def is_entry(m: Node, k: Node) -> Node:
    """Bundle m is a memory bundle, and k one of its entries that is no NOP."""
    return all_of(
        m.ge(0),
        m.lt(n.log_length),
        n.log_kind[m].eq(MEM),
        k.ge(0),
        k.lt(x.log_entries[m]),
        x.entry_operation[m, k].ne(NOP),
    )


def entries(body: Callable[[Bound, Bound], Node]) -> Node:
    """For every entry of the log that is no NOP."""
    return forall(
        {"m": MESSAGE, "k": ENTRY},
        lambda m, k: implies(is_entry(m, k), body(m, k)),
        lambda m, k: (x.entry_operation[m, k], x.entry_page[m, k], x.imported[m, k]),
    )


def imports(body: Callable[[Bound, Bound], Node]) -> Node:
    """For every entry that the destination imported."""
    return forall(
        {"m": MESSAGE, "k": ENTRY},
        lambda m, k: implies(all_of(in_session, x.imported[m, k]), body(m, k)),
        lambda m, k: (x.imported[m, k],),
    )


def sent(p: Node) -> tuple[Node, Node]:
    return x.sent_bundle[p], x.sent_entry[p]


def last(p: Node) -> tuple[Node, Node]:
    return x.last_bundle[p], x.last_entry[p]


def copy_was_sent(p: Node) -> Node:
    """The newest in-order entry of the page carries it, or says that it is pending."""
    return all_of(x.sent_bundle[p].ge(0), x.entry_operation[sent(p)].ne(CANCEL))


def is_current(p: Node) -> Node:
    """The newest in-order entry of the page is what the page holds now."""
    return all_of(
        x.entry_version[sent(p)].eq(x.version[p]),
        x.entry_pending[sent(p)].eq(s.page[p].in_(*s.PENDING_STATES)),
    )


def exported_clean(p: Node) -> Node:
    return s.page[p].in_(EXPORTED_BLOCKEDW, PENDING_EXPORTED_BLOCKEDW)


def nobody_writes(p: Node) -> Node:
    """No vCPU has a translation from before the page was write-blocked."""
    return any_of(
        x.blocked_at[p].lt(s.td_epoch - 1),
        all_of(x.blocked_at[p].eq(s.td_epoch - 1), s.refcount_previous.eq(0)),
    )


def being_made(m: Node) -> Node:
    """The EXPORT.MEM that makes the bundle is under way."""
    return all_of(s.unfinished[n.log_stream[m]], s.unfinished_bundle[n.log_stream[m]].eq(m))


def entry_is_of(m: Node, k: Node, p: Node) -> Node:
    return all_of(is_entry(m, k), x.entry_page[m, k].eq(p))
