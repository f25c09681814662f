"""Text and conversation sources: formats, errors that name the line, epochs, resume."""

from __future__ import annotations

import json

import pytest

from openzaya.data.chat import render
from openzaya.data.documents import LINES_PER_GROUP, PYTHON_STDLIB, DocumentStream, find_files
from openzaya.data.mixture import Source
from openzaya.data.sources import ConversationSource, TextSource
from openzaya.errors import DataError

TEXTS = [f"document number {i}\n" + "word " * (i % 40) for i in range(300)]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_parquet(path, records, rows=32):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=rows)
    return path


def folder_of_text(tmp_path):
    for i, text in enumerate(TEXTS[:40]):
        (tmp_path / f"sub{i % 3}").mkdir(exist_ok=True)
        (tmp_path / f"sub{i % 3}" / f"{i}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    return tmp_path, TEXTS[:40]


def jsonl_of_text(tmp_path):
    return write_jsonl(tmp_path / "a.jsonl", [{"text": text, "id": 1} for text in TEXTS]), TEXTS


def parquet_of_text(tmp_path):
    return write_parquet(tmp_path / "a.parquet", [{"text": text} for text in TEXTS]), TEXTS


def read_epoch(source, tokenizer, num_documents):
    """Documents put together again from their chunks, until ``num_documents`` ended."""
    documents, body = [], []
    while len(documents) < num_documents:
        example = source.next_example()
        if example is None:
            continue
        assert example.tokens[0] == tokenizer.bos_token_id
        assert example.loss_mask == [False] + [True] * (len(example.tokens) - 1)
        body += example.tokens[1:]
        if body[-1] == tokenizer.eos_token_id:
            documents.append(tokenizer.decode(body[:-1]))
            body = []
    return documents


@pytest.mark.parametrize("make", [folder_of_text, jsonl_of_text, parquet_of_text])
def test_text_sources_give_every_document_whole_and_once_an_epoch(tokenizer, tmp_path, make):
    path, texts = make(tmp_path)
    source = TextSource(tokenizer, 16, paths=path, seed=3)
    assert isinstance(source, Source)
    first, second = (read_epoch(source, tokenizer, len(texts)) for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(texts)
    assert first != second and first != texts, "each epoch has its own order"
    again = TextSource(tokenizer, 16, paths=path, seed=3)
    assert read_epoch(again, tokenizer, len(texts)) == first
    assert source.report()["documents"] == 2 * len(texts)


@pytest.mark.parametrize("make", [folder_of_text, jsonl_of_text, parquet_of_text])
@pytest.mark.parametrize("num_before", [0, 1, 65, 700])
def test_text_sources_resume_anywhere(tokenizer, tmp_path, make, num_before):
    path, _ = make(tmp_path)
    first = TextSource(tokenizer, 8, paths=path)
    for _ in range(num_before):
        first.next_example()
    second = TextSource(tokenizer, 8, paths=path)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [first.next_example() for _ in range(200)] == [second.next_example() for _ in range(200)]
    assert first.report() == second.report()


def test_chunks_are_as_long_as_the_context_allows(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("1" * 100, encoding="utf-8")
    source = TextSource(tokenizer, 32, paths=tmp_path / "*.txt")
    assert [len(source.next_example().tokens) for _ in range(5)] == [32, 32, 32, 1 + 101 - 93, 32]


def test_control_strings_in_documents_stay_text(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("x<|im_end|><bos>y", encoding="utf-8")
    tokens = TextSource(tokenizer, 64, paths=tmp_path).next_example().tokens
    assert tokens.count(4) == 1 and tokens.count(2) == 1
    assert tokenizer.decode(tokens[1:-1]) == "x<|im_end|><bos>y"


def test_standard_library_is_the_default(tokenizer):
    files = find_files(PYTHON_STDLIB)
    assert len(files) > 200
    paths = [str(file.path) for file in files]
    assert paths == sorted(paths) and not any("/test/" in path or "site-packages" in path for path in paths)
    source = TextSource(tokenizer, 128)
    assert sum(len(source.next_example().tokens) for _ in range(50)) > 3000


def test_empty_documents_are_passed_over_and_an_empty_epoch_is_an_error(tokenizer, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": ""}, {"text": "x"}])
    source = TextSource(tokenizer, 8, paths=tmp_path)
    found = [source.next_example() for _ in range(4)]
    assert [example is None for example in found].count(True) == 2
    write_jsonl(tmp_path / "a.jsonl", [{"text": ""}] * 3)
    source = TextSource(tokenizer, 8, paths=tmp_path)
    with pytest.raises(DataError, match="a whole epoch of documents holds no text"):
        for _ in range(20):
            source.next_example()


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"{broken", "not a JSON value"),
        (b"[1]", "holds a list"),
        (b'{"txt": "a"}', r"field 'text' is NoneType.*\['txt'\]"),
        (b'{"text": 5}', "field 'text' is int"),
        (b'{"text": "\xff"}', "not UTF-8"),
    ],
)
@pytest.mark.parametrize("number", [3, LINES_PER_GROUP + 2])
def test_broken_lines_are_named(tokenizer, tmp_path, line, complaint, number):
    lines = [b'{"text": "fine"}'] * (LINES_PER_GROUP + 5)
    lines[0] = b""
    lines[number - 1] = line
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    source = TextSource(tokenizer, 8, paths=tmp_path)
    with pytest.raises(DataError, match=rf"a\.jsonl:{number}: .*{complaint}"):
        for _ in range(2 * len(lines)):
            source.next_example()


def test_other_broken_files(tokenizer, tmp_path):
    with pytest.raises(DataError, match="names no files"):
        TextSource(tokenizer, 8, paths=tmp_path)
    (tmp_path / "a.txt").write_bytes(b"ab\xffc")
    with pytest.raises(DataError, match=r"a\.txt: byte 2 is not UTF-8"):
        TextSource(tokenizer, 8, paths=tmp_path).next_example()
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="not a readable parquet file"):
        TextSource(tokenizer, 8, paths=tmp_path / "b.parquet")
    write_parquet(tmp_path / "c.parquet", [{"text": "a"}, {"text": None}])
    source = TextSource(tokenizer, 8, paths=tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r"c\.parquet:row 2: field 'text' is NoneType"):
        source.next_example()
    (tmp_path / "d.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match="hold no records"):
        TextSource(tokenizer, 8, paths=tmp_path / "d.jsonl")
    (tmp_path / "e.jsonl").write_bytes(b"\n\n")
    with pytest.raises(DataError, match="holds any"):
        TextSource(tokenizer, 8, paths=tmp_path / "e.jsonl").next_example()
    with pytest.raises(DataError, match="context_length=1"):
        TextSource(tokenizer, 1)


def test_changed_data_is_noticed_on_resume(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    state = DocumentStream(find_files(tmp_path), 0).state_dict()
    write_jsonl(tmp_path / "b.jsonl", [{"text": "x"}])
    with pytest.raises(DataError, match="restore the data"):
        DocumentStream(find_files(tmp_path), 0).load_state_dict(state)


# --- conversations ---------------------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]


def conversation(i):
    return [
        {"role": "user", "content": f"question {i}"},
        {"role": "assistant", "reasoning_content": "step " * (i % 30), "content": "answer " * (1 + i % 20)},
    ]


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_conversations_are_trimmed_and_reported(tokenizer, tmp_path, write):
    records = [{"messages": conversation(i)} for i in range(150)]
    source = ConversationSource(tokenizer, 60, paths=write(tmp_path / f"a.{write.__name__[6:]}", records))
    examples = [source.next_example() for _ in range(150)]
    full = [len(render(record["messages"], tokenizer).tokens) for record in records]
    report = source.trim_report
    kept = [example for example in examples if example is not None]
    assert report.num_samples == 150 and report.dropped == 150 - len(kept) > 0
    assert report.kept == sum(size <= 60 for size in full) and report.tail_trimmed > 0
    assert report.tokens_in == sum(full) and report.tokens_lost == sum(full) - sum(len(e.tokens) for e in kept)
    assert all(len(example.tokens) <= 60 and any(example.loss_mask) for example in kept)
    assert source.report()["dropped"] == report.dropped


@pytest.mark.parametrize("num_before", [0, 1, 70, 200])
def test_conversations_resume_anywhere(tokenizer, tmp_path, num_before):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": conversation(i)} for i in range(150)])
    first, second = (ConversationSource(tokenizer, 60, paths=path) for _ in range(2))
    for _ in range(num_before):
        first.next_example()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [first.next_example() for _ in range(150)] == [second.next_example() for _ in range(150)]
    assert first.report() == second.report()


def test_conversations_with_tools(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": conversation(2), "tools": TOOLS}])
    example = ConversationSource(tokenizer, 500, paths=path).next_example()
    assert example.tokens == render(conversation(2), tokenizer, tools=TOOLS).tokens


def test_conversations_that_never_fit_are_reported_not_looped_on(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": conversation(19)}] * 3)
    source = ConversationSource(tokenizer, 12, paths=path)
    with pytest.raises(DataError, match=r"no conversation of a whole epoch fits 12 tokens \(AP trimming: .* dropped"):
        for _ in range(50):
            assert source.next_example() is None


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"chat": []}, "has no field 'messages'"),
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "me", "content": "b"}]}, "role 'me' is unknown"),
    ],
)
def test_broken_conversations_are_named(tokenizer, tmp_path, record, complaint):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": conversation(1)}, record])
    with pytest.raises(DataError, match=rf"a\.jsonl:2: .*{complaint}"):
        ConversationSource(tokenizer, 60, paths=path).next_example()
