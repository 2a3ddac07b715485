"""One instance of each model that is small enough to look at every state of it several times."""

from __future__ import annotations

from typing import Any

from expectations import instance_of

from tdxmig_model.expr import Instance, System

Ceilings = dict[str, int]
ONE_PAGE = {"Page": 1, "Stream": 1, "Vcpu": 1, "Epoch": 4, "Message": 3}
FEW: Ceilings = {
    "": 1,
    "source_num_migs": 2,
    "destination_num_migs": 2,
    "source_refcount": 0,
    "source_refcount_previous": 0,
    "source_total_mb_count": 3,
    "destination_total_mb_count": 3,
    "source_next_mb_counter": 2,
    "destination_expected_mb_counter": 2,
    "destination_mig_epoch": 3,
    "destination_page_epoch": 3,
    "log_counter": 2,
    "log_epoch": 3,
    "log_total": 3,
    "token_position": 3,
}
SMALL: dict[str, tuple[dict[str, int], Ceilings]] = {
    "lifecycle": ({"Vcpu": 1, "Epoch": 4, "Message": 4}, {}),
    "leaf": (ONE_PAGE, FEW),
    "order": (ONE_PAGE, FEW),
    "memory": ({**ONE_PAGE, "Entry": 1}, {**FEW, "destination_accepted_end": 4}),
    "control": ({"Field": 2}, {}),
    "keys": (
        {"Key": 4, "Counter": 1, "Link": 1, "Use": 1, "Version": 1},
        {"": 4, "sessions": 1},
    ),
    "key_words": ({"Key": 3, "Word": 2}, {}),
    "bindings": ({"ServiceTd": 2, "InfoHash": 2}, {"": 2}),
    "terms": ({"Td": 2, "Key": 4, "Link": 2, "Term": 1, "Receipt": 1}, {"keys_made": 3}),
    "forks": ({"Td": 2, "Exchange": 2}, {}),
    "locks": ({"Processor": 1, "Link": 1, "Page": 1}, {"": 2}),
    "import locks": ({"Processor": 2, "Link": 1, "Page": 1}, {"": 2}),
    "calls": ({"Operands": 1, "Value": 2}, {"": 1}),
    "guest pages": ({"Page": 2}, {}),
}


def entry_of(model: str, profile: str) -> dict[str, Any]:
    """The instance in the form of specs/expect.json, which has larger ones."""
    sizes, given = SMALL[model]
    return {"model": model, "profile": profile, "sizes": sizes, "ceilings": given}


def small(model: str, profile: str) -> tuple[System, Instance, Ceilings]:
    """The system under a profile, its sizes, and the ceilings of its integers by name."""
    return instance_of(entry_of(model, profile))
