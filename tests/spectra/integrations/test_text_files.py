import csv
import json

import pytest

from spectra.backend.errors import InputError
from spectra.integrations.text_files import read_texts

LINES = ["first line", "", 'a \u2028 separator, a \x85 and "quotes"', "海森矩阵 ends"]


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_text_file_is_read_as_it_is_with_line_feeds(tmp_path):
    good = written(tmp_path, "good.txt", "\ufeffhello\r\n")
    assert read_texts([good, str(good)]) == ["hello\n", "hello\n"]


def test_utf_16_is_known_by_its_byte_order_mark(tmp_path):
    for encoding in ("utf-16-le", "utf-16-be"):
        path = written(tmp_path, "wide.txt", ("\ufeff" + "\n".join(LINES)).encode(encoding))
        assert read_texts([path]) == ["\n".join(LINES)]


def table(folder, ending, rows):
    path = folder / f"rows{ending}"
    if ending == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif ending in (".jsonl", ".ndjson"):
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if ending == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("ending", [".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".JSONL"])
def test_of_a_table_the_column_of_text_is_taken(ending, tmp_path):
    lines = [*LINES, "long " * 50_000]  # beyond the 131,072 characters that csv takes by itself
    path = table(tmp_path, ending.lower(), [{"id": index, "text": line} for index, line in enumerate(lines)])
    assert read_texts([path.rename(tmp_path / f"rows{ending}")]) == ["\n".join(lines)]
    assert csv.field_size_limit() == 131_072


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_a_table_without_that_column_is_refused_with_the_columns_it_has(ending, tmp_path):
    path = table(tmp_path, ending, [{"body": "some text", "label": "1"}])
    with pytest.raises(InputError, match=r"has no 'text', only body, label: expected plain text in UTF-8, or \.jsonl"):
        read_texts([path])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("blank.txt", " \n", "blank.txt is empty: give a file with text in it"),
        ("image.bin", b"ab\xff\xfe", "byte 2 of .*image.bin is not: convert the file first, for example with iconv"),
        ("latin.txt", "über".encode("latin-1"), "byte 0 of .*latin.txt is not"),
        ("torn.jsonl", '{"text": "a"}\n{"text": ', "line 2 of .*torn.jsonl is no JSON"),
        ("list.jsonl", '["a"]\n', "line 1 of .*list.jsonl has no 'text': expected"),
        ("number.jsonl", '{"text": 3}\n', "expected text in 'text' of line 1 of .*number.jsonl, got int"),
        ("empty.jsonl", '{"text": ""}\n{"text": null}\n', "the column 'text' of .*empty.jsonl is empty"),
        ("broken.parquet", b"PAR1 and no more", "broken.parquet cannot be read as Parquet"),
        ("renamed.txt", b"PAR1\x00\x00", "renamed.txt is a Parquet file: give it a name that ends in .parquet"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(name, content, message, tmp_path):
    pytest.importorskip("pyarrow")
    with pytest.raises(InputError, match=message) as caught:
        read_texts([written(tmp_path, name, content)])
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"there is no file .*nothing\.txt"):
        read_texts([tmp_path / "nothing.txt"])
    with pytest.raises(InputError, match=r"is a folder: name its files, such as .*\*\.txt"):
        read_texts([tmp_path])
