"""Reading training data, choosing columns, splitting, and the order of batches; refusals are asserted by their text."""

from __future__ import annotations

import http.server
import json
import re
import socketserver
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trimtab.training.data as data_module
from trimtab.errors import SettingError
from trimtab.extras import MissingExtraError
from trimtab.training.batches import BatchOrder, Position
from trimtab.training.columns import LABEL, TEXT, find_column
from trimtab.training.data import read_table
from trimtab.training.errors import DataError
from trimtab.training.hub import hub_is_reachable
from trimtab.training.splits import refuse_training_rows, split_table
from trimtab.training.table import Table


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def make_table(labels: list[str]) -> Table:
    rows = tuple((f"text {index}", label) for index, label in enumerate(labels))
    return Table("made.csv", ("text", "label"), rows, tuple(range(2, len(rows) + 2)))


# Reading


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'text,label\nhi,3\n"two, ""lines""\nhere",4\n'),
        ("a.csv", '\ufefftext,label\r\nhi,3\r\n\r\n"two, ""lines""\nhere",4'),
        ("a.jsonl", '{"text": "hi", "label": 3}\n\n{"label": 4, "text": "two, \\"lines\\"\\nhere"}'),
        ("a.json", '[{"text": "hi", "label": 3},\n {"text": "two, \\"lines\\"\\nhere", "label": 4}]\n'),
        ("a.json", '{"text": "hi", "label": 3}\n{"text": "two, \\"lines\\"\\nhere", "label": 4}\n'),
    ],
)
def test_every_form_gives_the_same_table(tmp_path: Path, name: str, content: str) -> None:
    table = read_table(write(tmp_path, name, content))
    assert table.columns == ("text", "label")
    assert table.texts("text") == ("hi", 'two, "lines"\nhere')
    assert table.labels("label") == ("3", "4")


def test_rows_know_their_line_after_quoted_line_breaks_and_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'text,label\n"one\ntwo\nthree",a\n\nfour,b\n')
    assert read_table(path).positions == (2, 6)
    path = write(tmp_path, "a.json", '[\n {"text": "a",\n  "label": 1},\n\n {"text": "b", "label": 2}]')
    assert read_table(path).positions == (2, 5)


def test_a_quote_in_a_tab_separated_file_is_an_ordinary_character(tmp_path: Path) -> None:
    path = write(tmp_path, "a.tsv", 'text\tlabel\n"not closed\t0\nsecond" row\t1\n')
    assert read_table(path).rows == (('"not closed', "0"), ('second" row', "1"))


def test_a_file_without_a_header_line_takes_the_given_names(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "a.tsv", "fine\t1\nbad\t0\n"), header=("text", "label"))
    assert table.labels("label") == ("1", "0")
    assert table.place(1) == f"{tmp_path}/a.tsv, line 2"


def test_json_line_separators_inside_texts_do_not_end_a_line(tmp_path: Path) -> None:
    assert read_table(write(tmp_path, "a.jsonl", '{"text": "a\u2028b"}\n')).texts("text") == ("a\u2028b",)


def test_a_table_cannot_be_changed() -> None:
    table = make_table(["a", "b"])
    with pytest.raises(AttributeError):
        table.rows = ()  # type: ignore[misc]
    with pytest.raises(TypeError):
        table.rows[0][0] = "changed"  # type: ignore[index]


MALFORMED = [
    ("a.csv", "", "a.csv is empty; at least one row of data is needed."),
    ("a.csv", " \n\n", "a.csv is empty; at least one row of data is needed."),
    ("a.csv", "text,label\n", "a.csv holds a header (text, label) but no rows; at least one row is needed."),
    ("a.json", "[]", "a.json holds no rows; at least one row of data is needed."),
    (
        "a.csv",
        "text,label\nfine,a\nHello, world,b\n",
        (
            "a.csv, line 3: found 3 fields, but the header on line 1 has 2 (text, label). "
            "A field that holds ',' or a line break must stand in double quotes."
        ),
    ),
    (
        "a.tsv",
        "text\tlabel\nonly\n",
        (
            "a.tsv, line 2: found 1 field, but the header on line 1 has 2 (text, label). "
            "A field of a tab-separated file cannot hold a tab"
        ),
    ),
    ("a.csv", 'text,label\nok,a\n"open,b\nnext,c\n', "a.csv, line 3: the record that starts here is not valid: "),
    ("a.csv", 'text,label\n"a"b,c\n', "a.csv, line 2: the record that starts here is not valid: "),
    ("a.csv", "text,text\na,b\n", "the header names the column 'text' twice; give each column its own name."),
    ("a.csv", "text,\na,b\n", "column 2 has no name in the header; each column needs one."),
    ("a.csv", b"text,label\nok,a\ncaf\xe9,b\n", "a.csv, line 3: not UTF-8 (byte 0xe9 at offset 19). Save the file as"),
    ("a.csv", b"\xef\xbb\xbftext\ncaf\xe9\n", "a.csv, line 2: not UTF-8 (byte 0xe9 at offset 11). "),
    ("a.jsonl", '{"text": "a"}\n{"text": \n', "a.jsonl, line 2: invalid JSON: Expecting value at column 10. "),
    ("a.jsonl", '{"text": "a"}\n["a"]\n', """a.jsonl, line 2: found ["a"], which is not an object. Each row is"""),
    ("a.jsonl", '{"a": 1, "a": 2}', "a.jsonl, line 1: invalid JSON: the key 'a' occurs twice in one object."),
    ("a.jsonl", "[" * 100_000, "a.jsonl, line 1: invalid JSON: nested too deeply"),
    ("a.json", '[{"text": "a"},\n {"text": }]', "a.json, line 2: invalid JSON: Expecting value at column 11."),
    ("a.json", '[{"text": "a"}\n {"text": "b"}]', "a.json, line 2: invalid JSON: found '{' where ',' and an object"),
    ("a.json", '[{"text": "a"},\n]', "a.json, line 1: invalid JSON: found a comma before ']' where"),
    ("a.json", '[{"text": "a"}', "a.json, line 1: invalid JSON: found the end of the file where"),
    ("a.json", '[{"text": "a"}]\n[]', "a.json, line 2: found '[]' after the end of the list."),
    ("a.json", '[{"text": "a"},\n 7]', "a.json, line 2: found 7, which is not an object."),
    ("a.json", '"text"', "a.json: found '\"text\"'; a JSON file holds a list of objects."),
    ("a.txt", "text", "the ending '.txt' names no known format. Known: .csv, .tsv, .jsonl"),
]


@pytest.mark.parametrize(("name", "content", "message"), MALFORMED)
def test_malformed_files_are_refused_with_file_line_and_way_out(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        read_table(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_refused_with_the_nearest_names(tmp_path: Path) -> None:
    write(tmp_path, "train.csv", "text\na\n")
    with pytest.raises(DataError, match=r"there is no file or folder '.*/trian\.csv'\. Did you mean 'train\.csv'\?"):
        read_table(tmp_path / "trian.csv")


def test_options_of_separated_files_are_refused_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"delimiter=… is for \.csv and \.tsv files; leave it out"):
        read_table(write(tmp_path, "a.jsonl", '{"text": "a"}'), delimiter=";")


# Values


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "  "}, "line 2: column 'text' is empty. Fill it in, or remove the row."),
        ({"label": "a"}, "line 2: column 'text' is missing. Fill it in, or remove the row."),
        ({"text": 3.5}, "line 2: column 'text' holds 3.5, which is a float, not a text."),
        ({"text": "\ud800"}, "line 2: column 'text' holds half of a surrogate pair, which is not valid Unicode."),
    ],
)
def test_a_row_without_a_usable_text_is_refused(tmp_path: Path, row: dict[str, object], message: str) -> None:
    table = read_table(write(tmp_path, "a.jsonl", '{"text": "fine"}\n' + json.dumps(row)))
    with pytest.raises(DataError, match=re.escape(message)):
        table.texts("text")


def test_missing_and_unusable_labels_are_refused_and_counted(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "a.csv", "text,label\na,x\nb,\nc,y\nd, \n"))
    message = r"a\.csv, line 3: column 'label' holds no label\. Give the row a label, or remove it\. \(1 more such rows"
    with pytest.raises(DataError, match=message):
        table.labels("label")
    table = read_table(write(tmp_path, "a.jsonl", '{"label": true}\n{"label": 0.5}'))
    with pytest.raises(DataError, match=r"line 2: column 'label' holds 0\.5, which is a float, not the name or number"):
        table.labels("label")


def test_labels_are_text_without_surrounding_blanks(tmp_path: Path) -> None:
    content = '{"label": true}\n{"label": -7}\n{"label": " a b "}'
    assert read_table(write(tmp_path, "a.jsonl", content)).labels("label") == ("true", "-7", "a b")


# Columns


def test_a_missing_column_is_refused_with_the_nearest_names() -> None:
    message = "made.csv has no column 'lable'. Did you mean 'label'? It has the columns 'text', 'label'."
    with pytest.raises(DataError, match=re.escape(message)):
        find_column(make_table(["a"]), "label", "lable", LABEL)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [(("Sentence", "Intent"), ("Sentence", "Intent")), (("id", "message", "category"), ("message", "category"))],
)
def test_conventional_names_are_found(columns: tuple[str, ...], expected: tuple[str, str]) -> None:
    table = Table("a.csv", columns, (("x",) * len(columns),), (2,))
    assert (find_column(table, "text", None, TEXT), find_column(table, "label", None, LABEL)) == expected


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            ("text", "sentence"),
            "the columns 'text', 'sentence'; 'text' and 'sentence' could each be the text. Name it: ",
        ),
        (("x", "y"), "the columns 'x', 'y'; which of them is the text cannot be told from the names. Name it: text=…"),
        (("text;label",), "the column 'text;label'; which of them is the text cannot be told from the names."),
        (("text;label",), "The fields seem to be separated by ';': give delimiter=';'"),
        (("great film", "1"), "If these are data, not names, give the names with header=…"),
    ],
)
def test_columns_that_cannot_be_told_are_listed(columns: tuple[str, ...], message: str) -> None:
    table = Table("a.csv", columns, (("x",) * len(columns),), (2,))
    with pytest.raises(DataError, match=re.escape(message)):
        find_column(table, "text", None, TEXT)


def test_another_delimiter_can_be_given(tmp_path: Path) -> None:
    assert read_table(write(tmp_path, "a.csv", "text;label\na,b;c\n"), delimiter=";").rows == (("a,b", "c"),)


# Parquet and the datasets library


def test_parquet_gives_rows_and_a_broken_file_is_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", None], "label": [1, 2]}), tmp_path / "a.parquet")
    table = read_table(tmp_path / "a.parquet")
    assert table.labels("label") == ("1", "2")
    with pytest.raises(DataError, match=r"a\.parquet, row 2: column 'text' is missing"):
        table.texts("text")
    with pytest.raises(DataError, match=r"b\.parquet is not a readable Parquet file: "):
        read_table(write(tmp_path, "b.parquet", "no parquet"))


def test_a_missing_package_is_an_error_that_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"package 'pyarrow'.*pip install 'trimtab\[hf\]'"):
        read_table(write(tmp_path, "a.parquet", "x"))


def test_saved_data_sets_give_class_names_and_list_their_splits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    datasets.DatasetDict({"train": rows.select([1, 0]), "test": rows}).save_to_disk(str(tmp_path / "saved"))
    assert read_table(tmp_path / "saved").rows == (("b", "no"), ("a", "yes"))
    with pytest.raises(DataError, match=r"saved \[test\], row 3: column 'label' holds no label"):
        read_table(tmp_path / "saved", split="test").labels("label")
    with pytest.raises(DataError, match=r"saved has no split 'tset'\. Did you mean 'test'\?"):
        read_table(tmp_path / "saved", split="tset")


def test_a_folder_of_files_is_read_by_split(tmp_path: Path) -> None:
    write(tmp_path, "train.csv", "text\na\n")
    write(tmp_path, "test.jsonl", '{"text": "b"}')
    assert read_table(tmp_path).texts("text") == ("a",)
    assert read_table(tmp_path, split="test").texts("text") == ("b",)
    write(tmp_path, "test.tsv", "text\nb\n")
    with pytest.raises(DataError, match=r"holds several files for the split 'test': test\.jsonl, test\.tsv\. Name the"):
        read_table(tmp_path, split="test")


def test_an_unreachable_hub_is_one_error_with_local_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "hub_is_reachable", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "banking77").mkdir()
    message = (
        "'banking_77' is no file or folder here, and the data-set hub cannot be reached. Did you mean 'banking77'?"
    )
    with pytest.raises(DataError, match=re.escape(message)):
        read_table("banking_77")


def test_the_hub_is_asked_once_without_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socketserver.TCPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:  # answers 501
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert hub_is_reachable()
        thread.join()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert not hub_is_reachable()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert not hub_is_reachable()  # nobody listens there any more


@pytest.mark.shared
def test_published_data_sets_are_read_whole(shared: Path) -> None:
    assert len(read_table(shared / "data/banking77/train.csv")) == 10_003
    assert len(set(read_table(shared / "data/banking77/test.csv").labels("category"))) == 77
    assert len(read_table(shared / "data/gsm8k/test.jsonl").texts("answer")) == 1_319
    assert len(read_table(shared / "data/sst2/train.tsv", header=("text", "label")).texts("text")) == 6_920


# Splits


def test_a_split_is_disjoint_complete_stratified_and_a_function_of_the_seed() -> None:
    table = make_table(["a"] * 50 + ["b"] * 30 + ["c"] * 20)
    split = split_table(table, validation=0.2, test=0.1, seed=3, label="label")
    assert split.validation is not None
    assert split.test is not None
    parts = (split.train, split.validation, split.test)
    assert sorted(row for part in parts for row in part.rows) == sorted(table.rows)
    assert [Counter(part.labels("label")) for part in parts] == [
        {"a": 35, "b": 21, "c": 14}, {"a": 10, "b": 6, "c": 4}, {"a": 5, "b": 3, "c": 2},
    ]  # fmt: skip
    assert split_table(table, validation=0.2, test=0.1, seed=3, label="label") == split
    assert split_table(table, validation=0.2, test=0.1, seed=4, label="label") != split
    assert all(
        table.rows[line - 2] == row for part in parts for line, row in zip(part.positions, part.rows, strict=True)
    )


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(3, 9), min_size=4, max_size=6),
    validation=st.floats(0.05, 0.45),
    test=st.floats(0.05, 0.45),
)
def test_training_keeps_every_class_and_no_part_has_more_than_a_row_above_its_share(
    sizes: list[int], validation: float, test: float
) -> None:
    sizes = [*sizes, 1]
    table = make_table([str(label) for label, size in enumerate(sizes) for _ in range(size)])
    split = split_table(table, validation=validation, test=test, label="label")
    assert set(split.train.labels("label")) == set(table.labels("label"))
    parts = [part for part in (split.train, split.validation, split.test) if part is not None]
    assert sorted(row for part in parts for row in part.rows) == sorted(table.rows)
    for part, share in ((split.validation, validation), (split.test, test)):
        assert part is not None
        for label, count in Counter(part.labels("label")).items():
            assert count <= sizes[int(label)] * share + 1


def test_impossible_splits_are_refused() -> None:
    with pytest.raises(SettingError, match=r"validation=0\.6 and test=0\.4 leave no rows to train on"):
        split_table(make_table(["a"] * 9), validation=0.6, test=0.4)
    with pytest.raises(SettingError, match=r"test=1\.5; it is a share of the rows"):
        split_table(make_table(["a"] * 9), test=1.5)
    with pytest.raises(DataError, match=r"validation=0\.1 of its 2 rows is not one row that training can spare"):
        split_table(make_table(["a", "b"]), validation=0.1, label="label")


@pytest.mark.parametrize("name", ["validation", "test"])
def test_the_training_data_are_no_test(tmp_path: Path, name: str) -> None:
    train, copy = tmp_path / "train.csv", tmp_path / "copy.csv"
    for file in (train, copy):
        file.write_text("text,label\none,a\ntwo,b\n", encoding="utf-8")
    with pytest.raises(DataError) as refusal:
        refuse_training_rows(name, read_table(train), read_table(train))
    assert str(refusal.value) == (
        f"{name}={train}: holds the rows that are trained on, so its figures would say nothing about new rows. Give "
        f"other data, or a share of the rows that is kept back, for example {name}=0.1."
    )
    with pytest.raises(DataError, match=rf"holds the rows that are trained on, a copy of {re.escape(str(train))}, so"):
        refuse_training_rows(name, read_table(copy), read_table(train))
    copy.write_text("text,label\none,a\ntwo,a\n", encoding="utf-8")
    refuse_training_rows(name, read_table(copy), read_table(train))


# Batches


LENGTHS = tuple((index * 37) % 23 + 1 for index in range(1_003))


@pytest.mark.parametrize("group_by_length", [False, True])
def test_an_epoch_holds_every_row_once_in_an_order_of_its_own(group_by_length: bool) -> None:
    order = BatchOrder(LENGTHS, batch_size=8, seed=1, group_by_length=group_by_length)
    epochs = [order.batches(epoch) for epoch in range(3)]
    for batches in epochs:
        assert len(batches) == len(order) == 126
        assert sorted(row for batch in batches for row in batch) == list(range(1_003))
    assert len(set(epochs)) == 3
    assert order.batches(0) != BatchOrder(LENGTHS, 8, seed=2, group_by_length=group_by_length).batches(0)


def test_the_order_depends_on_the_seed_alone_and_leaves_generators_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    # Written down from the first version: a change of the order would break every resumed training.
    assert BatchOrder((1,) * 10, 4, seed=0).batches(0) == ((3, 5, 9, 1), (6, 4, 0, 7), (8, 2))
    assert torch.equal(torch.get_rng_state(), state)


def test_grouping_by_length_pads_less() -> None:
    def padding(order: BatchOrder) -> int:
        return sum(max(LENGTHS[row] for row in batch) * len(batch) for batch in order.batches(0)) - sum(LENGTHS)

    assert padding(BatchOrder(LENGTHS, 8, group_by_length=True)) < 0.1 * padding(BatchOrder(LENGTHS, 8))


def test_without_shuffling_rows_keep_their_order() -> None:
    assert BatchOrder((3, 1, 2), 2, shuffle=False).batches(4) == ((0, 1), (2,))


@pytest.mark.parametrize("group_by_length", [False, True])
def test_resuming_anywhere_gives_the_rest_of_the_unbroken_run(group_by_length: bool) -> None:
    order = BatchOrder(LENGTHS[:50], 8, seed=9, group_by_length=group_by_length)
    unbroken = list(order.run(3))
    assert len(unbroken) == 21
    for done, (position, _) in enumerate(unbroken, start=1):
        assert list(order.run(3, order.after(position))) == unbroken[done:]


def test_a_position_outside_the_run_is_refused() -> None:
    order = BatchOrder((1,) * 10, 4)
    message = "cannot resume at epoch 0, batch 3: the run has 2 epochs of 3 batches (counted from 0)."
    with pytest.raises(SettingError, match=re.escape(message)):
        list(order.run(2, Position(0, 3)))
    with pytest.raises(SettingError, match=r"batch_size=0; it must be at least 1"):
        BatchOrder((1,), 0)
