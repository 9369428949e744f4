"""Files of documents: what is read, and what bad files get."""

import gzip
import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flora_jax.core.errors import ConfigError, FormatError
from flora_jax.data import Fields, TextData, load_corpus
from flora_jax.data.corpora import CORPORA, PythonFiles, _base64, _dictd, _fortunes, _wordnet
from flora_jax.data.documents import (
    JsonLines,
    Subset,
    TextFiles,
    find_files,
    open_documents,
    open_records,
)
from flora_jax.data.text import open_source


def texts(source):
    return ["".join(t for t, _ in source[i].pieces) for i in range(len(source))]


RECORDS = st.lists(st.text(max_size=30), max_size=12)
BLANKS = st.lists(st.sampled_from(["", " ", "\r", "          ", "\t\r"]), max_size=3)


@settings(max_examples=80, deadline=None)
@given(RECORDS, BLANKS, st.sampled_from(["\n", "\r\n"]), st.booleans(), st.integers(1, 64))
def test_json_lines_random_access(tmp_path_factory, records, blanks, newline, last, block):
    path = tmp_path_factory.mktemp("jsonl") / "x.jsonl"
    lines, numbers = [], []
    for k, text in enumerate(records):
        lines += blanks if k % 2 else []
        lines.append(json.dumps({"text": text}, ensure_ascii=bool(k % 3)))
        numbers.append(len(lines))
    path.write_bytes((newline.join(lines) + newline * last).encode("utf-8", "surrogatepass"))
    reader = type("Small", (JsonLines,), {"_BLOCK": block})(path)
    assert [reader[i]["text"] for i in range(len(reader))] == records
    assert [reader.name(i) for i in range(len(reader))] == [f"{path}:{n}" for n in numbers]


def test_bad_json_lines_name_file_and_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": \n[1]\n{"txt": "b"}\n{"text": 3}\n{"prompt": "p"}\n')
    source = open_documents([path], Fields())
    assert source[0].pieces == (("a", True),)
    for index, message in (
        (1, r"bad\.jsonl:3: malformed JSON"),
        (2, r"bad\.jsonl:4: expected an object, got list"),
        (3, r"bad\.jsonl:5: field 'text' is missing; fields there: txt"),
        (4, r"bad\.jsonl:6: field 'text' must be str, got int"),
        (5, r"bad\.jsonl:7: field 'completion' is missing"),
    ):
        with pytest.raises(FormatError, match=message):
            source[index]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "non-empty list"),
        ("hi", "non-empty list"),
        (["hi"], "message 0: expected an object"),
        ([{"role": "user"}], "message 0: field 'content' is missing"),
    ],
)
def test_bad_messages(tmp_path, messages, message):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    with pytest.raises(FormatError, match=rf"chat\.jsonl:1.*{message}"):
        open_documents([path], Fields())[0]


def test_every_kind_of_file_gives_the_same_documents(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    wanted = [f"text {k}\u00e9" for k in range(7)]
    records = [{"body": t} for t in wanted]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "b.json").write_text(json.dumps(records))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "c.parquet", row_group_size=3)
    (tmp_path / "e.csv").write_text("label,body\n" + "".join(f'1,"{t}"\n' for t in wanted))
    (tmp_path / "d.tsv").write_text("body\tlabel\n" + "".join(f"{t}\t1\n" for t in wanted))
    for name in ("a.jsonl", "b.json", "c.parquet", "d.tsv", "e.csv"):
        source = open_documents([tmp_path / name], Fields(text="body"))
        assert texts(source) == wanted
        assert name in source.name(3)
        with pytest.raises(FormatError, match=rf"{name}.*field 'text' is missing"):
            open_documents([tmp_path / name], Fields())[4]
    both = open_source(str(tmp_path), Fields(text="body"))
    assert texts(both) == wanted * 5


def test_parquet_chats(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    pq.write_table(pa.Table.from_pylist([{"messages": chat}]), tmp_path / "c.parquet")
    assert open_documents([tmp_path / "c.parquet"], Fields())[0].messages == tuple(chat)


def test_parquet_errors(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(FormatError, match="x.parquet"):
        open_records([path])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match="needs pyarrow"):
        open_records([path])


def test_text_files_globs_and_separators(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("one\n%\ntwo\n%\n\n")
    (tmp_path / "sub" / "b.md").write_text("three")
    (tmp_path / "c.bin").write_bytes(b"\x00\xff")
    assert [p.name for p in find_files(str(tmp_path))] == ["a.txt", "b.md"]
    assert [p.name for p in find_files(str(tmp_path / "**" / "*.md"))] == ["b.md"]
    assert texts(TextFiles(find_files(str(tmp_path)))) == ["one\n%\ntwo\n%\n\n", "three"]
    parts = TextFiles(find_files(str(tmp_path)), "\n%\n")
    assert texts(parts) == ["one", "two", "three"]
    assert parts.name(1).endswith("a.txt part 2")
    with pytest.raises(FormatError, match=r"c\.bin: not UTF-8 text \(byte 1\)"):
        open_source(str(tmp_path / "c.bin"), Fields())[0]
    with pytest.raises(ConfigError, match="no data file at"):
        find_files(str(tmp_path / "*.nothing"))


def test_bad_tables(tmp_path):
    (tmp_path / "a.tsv").write_text("text\tlabel\nx\t1\ny\n")
    with pytest.raises(FormatError, match=r"a\.tsv:3: 1 columns, the header has 2"):
        open_records([tmp_path / "a.tsv"])
    (tmp_path / "a.csv").write_text('text,label\n"x\ny",1\nz,1,2\n')
    with pytest.raises(FormatError, match=r"a\.csv:4: 3 columns, the header has 2"):
        open_records([tmp_path / "a.csv"])
    (tmp_path / "b.json").write_text('{"text": "x"}')
    with pytest.raises(FormatError, match="expected a JSON array"):
        open_records([tmp_path / "b.json"])
    (tmp_path / "c.json").write_text("[1")
    with pytest.raises(FormatError, match=r"c\.json: malformed JSON"):
        open_records([tmp_path / "c.json"])
    with pytest.raises(ConfigError, match="not a file of records"):
        open_records([tmp_path / "a.doc"])


def test_unknown_corpus_names_the_nearest(tokenizer):
    with pytest.raises(ConfigError, match="'python-doc'; nearest: python-docs"):
        TextData(source="python-doc").train(tokenizer, 1)
    with pytest.raises(ConfigError, match="unknown corpus 'kvj'"):
        load_corpus("kvj")


def test_python_corpora_are_there_and_stable(tokenizer):
    docs = load_corpus("python-docs")
    assert len(docs) > 60 and sum(map(len, texts(docs))) > 300_000
    source = load_corpus("python-stdlib")
    names = [source.name(i) for i in range(len(source))]
    assert names == sorted(names) and "json/decoder.py" in names
    assert not any("test" in name.split("/") for name in names)
    at = names.index("json/decoder.py")
    assert "class JSONDecoder" in texts(_only(source, at))[0]
    strings = PythonFiles(docstrings=True)
    assert "Simple JSON" in texts(_only(strings, at))[0]
    assert "import" not in texts(_only(strings, names.index("json/scanner.py")))[0]
    data = TextData(source="python-docs", seq_len=128)
    held = {data.documents("held-out").name(i) for i in range(len(data.documents("held-out")))}
    assert len(held) == round(0.1 * len(docs))
    assert next(iter(data.evaluation(tokenizer, 4)))["loss_mask"].sum() > 400


def _only(source, index):
    return Subset(source, np.array([index]))


def test_missing_packages_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="apt-get install bible-kjv"):
        load_corpus("kjv")
    import flora_jax.data.corpora as corpora

    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ConfigError, match="lacks pydoc_data"):
        corpora.load_corpus("python-docs")
    gone = corpora.Corpus(
        name="gone",
        about="",
        install="apt-get install gone",
        read=lambda: _fortunes(tmp_path / "none"),
    )
    monkeypatch.setitem(CORPORA, "gone", gone)
    with pytest.raises(ConfigError, match="'gone' is not installed: .*apt-get install gone"):
        load_corpus("gone")


def test_kjv_through_a_program(tmp_path, monkeypatch):
    program = tmp_path / "bible"
    program.write_text("#!/bin/sh\nprintf 'Ge1:1 In the beginning\\nGe1:2 And\\nGe2:1 Thus\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    source = load_corpus("kjv")
    assert texts(source) == ["In the beginning\nAnd", "Thus"]
    assert [source.name(i) for i in range(2)] == ["Ge1", "Ge2"]


def test_fortunes_dictionaries_and_wordnet(tmp_path):
    folder = tmp_path / "games" / "fortunes"
    folder.mkdir(parents=True)
    (folder / "art").write_text("one\n%\ntwo\n%\n")
    (folder / "art.dat").write_bytes(b"\xff")
    assert texts(_fortunes(tmp_path)) == ["one", "two"]

    folder = tmp_path / "dictd"
    folder.mkdir()
    with gzip.open(folder / "book.dict.dz", "wb") as file:
        file.write(b"LICENCE" + b"apple\n a fruit\n" + b"pear")
    (folder / "book.index").write_text("00info\tA\tH\napple\tH\tP\npear\tW\tE\nbirne\tW\tE\n")
    assert texts(_dictd("book", tmp_path)) == ["apple\n a fruit", "pear"]
    assert _base64("K5") == 10 * 64 + 57

    folder = tmp_path / "wordnet"
    folder.mkdir()
    line = "0001 05 {} 02 big_cat 0 lion 0 001 @ 0002 n 0000 | a feline \n"
    for part, kind in (("noun", "n"), ("verb", "v"), ("adj", "a"), ("adv", "r")):
        (folder / f"data.{part}").write_text("  1 licence\n" + line.format(kind))
    assert texts(_wordnet(tmp_path)) == ["big cat, lion: a feline"] * 4
