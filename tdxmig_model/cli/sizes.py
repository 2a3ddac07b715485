"""Sizes and ceilings with which each model is explored and exported if none are given.

A search of them ends in seconds (of the memory model with the published profile, in a minute)
and reaches every goal but a second session of the leaf model.  specs/expect.json has larger ones.
"""

from __future__ import annotations

from collections.abc import Mapping

Sizes = Mapping[str, int]

PROTOCOL = ("leaf", "order", "memory")
"""The models that have the whole migration leaf by leaf, in one log."""

COMPLETION = {"lifecycle": "migrated", **dict.fromkeys(PROTOCOL, "cold")}
"""The goal that says that a migration completed, of the models that have one."""

LARGEST = 16
"""Of each index: more would not be searched, and only its formulas would fill the memory."""

_SIZES: dict[str, Sizes] = {
    "control": {"Field": 4},
    "keys": {"Key": 6, "Counter": 1, "Link": 1, "Use": 3, "Version": 2},
    "key_words": {"Key": 3, "Word": 4},
    "bindings": {"ServiceTd": 2, "InfoHash": 2},
    "terms": {"Td": 2, "Key": 5, "Link": 2, "Term": 2, "Receipt": 2},
    "forks": {"Td": 2, "Exchange": 3},
    "locks": {"Processor": 2, "Link": 2, "Page": 1},
    "import locks": {"Processor": 2, "Link": 2, "Page": 2},
    "calls": {"Operands": 2, "Value": 2},
    "guest pages": {"Page": 3},
}


def least_messages(vcpus: int) -> int:
    """Bundles of a shortest migration: immutable state, TD state, each vCPU, start token."""
    return 3 + vcpus


def default_sizes(model: str, given: Sizes) -> dict[str, int]:
    """The size of each index of the model, where none is given; the log's depends on the vCPUs.

    In the lifecycle model the log has also room for some epochs and memory.
    """
    if model in _SIZES:
        return dict(_SIZES[model])
    room = least_messages(given.get("Vcpu", 1)) + (3 if model == "lifecycle" else 0)
    sizes = {"Vcpu": 1, "Epoch": 4, "Message": min(LARGEST, room)}
    if model in PROTOCOL:
        sizes |= {"Page": 1, "Stream": 1}
    return sizes | {"Entry": 1} if model == "memory" else sizes


def default_ceilings(model: str, sizes: Sizes) -> dict[str, int]:
    """Ceilings that let a migration of these sizes complete, and a small search end in seconds.

    The name "" is every other integer that is no position.
    """
    if model == "lifecycle":
        return {"": least_messages(sizes["Vcpu"]) - 1}
    if model in PROTOCOL:
        return _of_a_log(model, sizes)
    largest = max(sizes.values())
    special = {
        "keys": {"sessions": 2},
        "terms": {"keys_made": sizes.get("Key", 1) - 1},
        # The epochs of this model end with the start epoch, which is 3 in a small instance.
        "locks": {"": max(largest, 3)},
    }
    return {"": largest, **special.get(model, {})}


def _of_a_log(model: str, sizes: Sizes) -> dict[str, int]:
    """For the models of the whole migration: one session and two epochs, whatever the sizes."""
    streams = sizes["Stream"]
    bundles = least_messages(sizes["Vcpu"])
    limits = {
        "": max(1, sizes["Page"], sizes["Vcpu"], streams - 1),
        "source_num_migs": streams + 1,
        "destination_num_migs": streams + 1,
        "source_td_epoch": 2,
        "source_bw_epoch": 2,
        "source_refcount": 0,
        "source_refcount_previous": 0,
        "source_total_mb_count": bundles,
        "destination_total_mb_count": bundles,
        "source_next_mb_counter": bundles - 1,
        "destination_expected_mb_counter": bundles - 1,
        "destination_mig_epoch": 3,
        "destination_page_epoch": 3,
        "log_counter": bundles - 1,
        "log_epoch": 3,
        "log_total": bundles,
        "token_position": bundles,
    }
    if model == "memory":
        # Positions of bundles are left at "": a page is sent in the first bundle that can have it.
        limits["destination_accepted_end"] = bundles + 1
    return limits
