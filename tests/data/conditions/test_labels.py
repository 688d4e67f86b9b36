"""Labels are numbers or names; what is no class is refused with what it was."""

import json

import pytest

from ldmscale.data.conditions.annotations import ClassLabels
from ldmscale.errors import DataError


def members(**record):
    return {"json": json.dumps(record).encode(), "cls": b"2\n"}


def test_labels_are_read_from_a_member_or_a_key_of_the_json():
    assert ClassLabels("cls", 3).of(members()) == 2
    assert ClassLabels("json:label", 3).of(members(label=1)) == 1
    assert ClassLabels("json:class", 3, ("cat", "dog")).of(members(**{"class": "dog"})) == 1


def test_a_name_that_is_a_number_is_looked_up_first():
    assert ClassLabels("cls", 3, ("7", "2")).number("2") == 1


@pytest.mark.parametrize(
    ("source", "record", "said"),
    [
        ("json:label", {"label": 3}, "the label 3 is out of range: there are 3 classes"),
        ("json:label", {"label": -1}, "out of range"),
        ("json:label", {"label": "cat"}, "there is no class 'cat' among the 3"),
        ("json:label", {}, "cannot be read: KeyError 'label'"),
        ("json:label", {"label": True}, "expected a whole number or a name"),
        ("json:label", {"label": 1.5}, "expected a whole number or a name"),
        ("txt", {}, "has no txt member for the label"),
    ],
)
def test_what_is_no_label_is_refused(source, record, said):
    with pytest.raises(DataError, match=said):
        ClassLabels(source, 3).of(members(**record))


def test_classes_come_back_as_they_were_saved(tmp_path):
    for labels in (ClassLabels("cls", 4), ClassLabels("json:class", 4, ("ä", "b"))):
        labels.save(tmp_path / "classes.json")
        assert ClassLabels.load(tmp_path / "classes.json") == labels
