"""Where text comes from, that no text is on both sides, and that tokens and blocks lose nothing."""

import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import texts
import torch

from qat.text import cache, corpus
from qat.text.corpus import Blocks, Text
from spectra.backend.errors import InputError
from spectra.integrations.loading import tokenize


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QAT_CACHE", str(tmp_path / "cache"))


def text_of(document, validation="some words to validate on"):
    return Text((document,), (validation,), "a test")


def test_the_standard_library_is_split_by_file_and_the_same_every_time():
    text = corpus.standard_library()
    assert text == corpus.standard_library()
    assert not set(text.train) & set(text.validation)
    share = sum(map(len, text.validation)) / text.characters
    assert 0.025 < share <= 0.1
    root = Path(sysconfig.get_path("stdlib"))
    assert (root / "argparse.py").read_text(encoding="utf-8") in text.train + text.validation
    assert text.characters > 2_000_000


def test_the_standard_library_has_no_tests_and_no_other_packages():
    files = corpus._python_files(Path(sysconfig.get_path("stdlib")))
    assert files
    assert not [path for path in files if {"site-packages", "test", "tests"} & set(path.parts)]


def test_a_python_without_its_source_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match="--text"):
        corpus.standard_library()


def test_ten_files_are_split_by_file(tmp_path):
    documents = [texts.prose(1000 + 50 * index, seed=index) for index in range(20)]
    text = corpus.read_files(texts.write(tmp_path, *documents))
    assert sorted(text.train + text.validation) == sorted(documents)
    assert 0.025 * sum(map(len, documents)) <= sum(map(len, text.validation)) <= 0.1 * sum(map(len, documents))


def test_the_order_of_files_does_not_change_their_side():
    documents = {f"file-{index}": texts.prose(1000, seed=index) for index in range(30)}
    held_out = corpus.split_by_file(documents)[1]
    assert set(corpus.split_by_file(dict(reversed(documents.items())))[1]) == set(held_out)


def test_files_too_uneven_to_split_give_their_tails():
    documents = {"large": texts.prose(50_000)} | {f"small-{index}": "x" * 10 for index in range(12)}
    train, validation = corpus.split_by_file(documents)
    assert len(validation) == len(documents)
    assert sum(map(len, validation)) > 0.09 * sum(map(len, documents.values()))
    assert [a + b for a, b in zip(train, validation, strict=True)] == list(documents.values())


@pytest.mark.parametrize("document", [texts.prose(5000), "字" * 3000, "ab", texts.prose(5000).replace("\n", " ")])
def test_a_tail_is_the_last_tenth_and_nothing_is_lost(document):
    (train,), (validation,) = corpus.split_by_tail([document])
    assert train + validation == document
    assert 0.08 * len(document) <= len(validation) <= 0.13 * len(document) + 1


def test_a_cut_near_a_line_end_is_at_the_line_end():
    (train,), _ = corpus.split_by_tail([texts.prose(20_000)])
    assert train.endswith("\n")


def test_files_and_a_dataset_at_once_are_refused():
    with pytest.raises(InputError, match="not both"):
        corpus.load_text(["a.txt"], "some/dataset")


def test_a_dataset_without_network_is_refused_in_one_line():
    with pytest.raises(InputError, match=r"no network: give files with --text") as refused:
        corpus.load_text(dataset="nobody/nothing")
    assert "\n" not in str(refused.value)


def test_a_dataset_gives_its_text_column_and_its_own_validation_split(monkeypatch):
    import datasets

    splits = datasets.DatasetDict(
        train=datasets.Dataset.from_dict({"id": ["x"] * 3, "text": ["one", None, "three"]}),
        validation=datasets.Dataset.from_dict({"id": ["x"], "text": ["four"]}),
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda name: splits)
    text = corpus.read_dataset("someone/something")
    assert text.train == ("one\n\nthree",)
    assert text.validation == ("four",)


def test_a_dataset_with_one_split_gives_its_tail(monkeypatch):
    import datasets

    split = datasets.Dataset.from_dict({"content": [texts.prose(5000)]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(all=split))
    text = corpus.read_dataset("someone/something")
    assert "".join(text.train + text.validation) == texts.prose(5000)


def test_a_dataset_without_text_names_its_columns(monkeypatch):
    import datasets

    split = datasets.Dataset.from_dict({"image": [1], "label": [2]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(train=split))
    with pytest.raises(InputError, match="image, label"):
        corpus.read_dataset("someone/something")


def test_the_tokenizer_gives_any_text_back():
    tokenizer = corpus.trained_tokenizer(text_of(texts.prose()), 300)
    assert len(tokenizer) == 300
    for document in (texts.prose(500, seed=5), "ಕನ್ನಡ עברית 🙂\t\r\n  def f(x): return x\n", ""):
        tokens = tokenize(tokenizer, [document])
        assert tokenizer.decode(tokens[:-1], clean_up_tokenization_spaces=False) == document
        assert tokens[-1] == tokenizer.eos_token_id


def test_the_tokenizer_is_kept_for_the_same_text_and_size(monkeypatch):
    import tokenizers

    first = corpus.trained_tokenizer(text_of(texts.prose()), 300)
    monkeypatch.delattr(tokenizers, "ByteLevelBPETokenizer")  # training again would fail
    assert corpus.trained_tokenizer(text_of(texts.prose()), 300).get_vocab() == first.get_vocab()
    with pytest.raises(ImportError):
        corpus.trained_tokenizer(text_of(texts.prose()), 310)
    with pytest.raises(ImportError):
        corpus.trained_tokenizer(text_of(texts.prose(seed=1)), 300)


def test_a_vocabulary_has_room_for_the_bytes():
    with pytest.raises(InputError, match="257 tokens or more, got 100"):
        corpus.trained_tokenizer(text_of("text"), 100)


def test_documents_are_joined_in_order_with_an_end_each():
    tokenizer = corpus.trained_tokenizer(text_of(texts.prose()), 300)
    both = tokenize(tokenizer, ["one brook", "two nests"])
    alone = [tokenize(tokenizer, [document]) for document in ("one brook", "two nests")]
    assert torch.equal(both, torch.cat(alone))
    assert len(tokenize(tokenizer, [])) == 0


def test_blocks_are_the_tokens_in_order_less_the_rest():
    blocks = Blocks(torch.arange(23), 5)
    assert len(blocks) == 4
    assert torch.equal(torch.cat([blocks[index]["input_ids"] for index in range(4)]), torch.arange(20))
    assert torch.equal(blocks[2]["labels"], blocks[2]["input_ids"])


def test_blocks_chosen_evenly_span_the_whole():
    blocks = Blocks(torch.arange(100), 2)
    assert blocks.evenly(5).blocks[:, 0].tolist() == [0, 20, 40, 60, 80]
    assert blocks.evenly(50) is blocks


def test_a_short_text_is_refused_with_both_counts():
    tokenizer = corpus.trained_tokenizer(text_of(texts.prose()), 300)
    text = text_of("one brook. " * 20)
    tokens = len(tokenize(tokenizer, text.train))
    with pytest.raises(InputError, match=rf"has {tokens} tokens and 6400 are needed .*--length"):
        corpus.make_blocks(text, tokenizer, length=64, train_blocks=100)


def test_what_is_made_for_the_cache_is_whole_or_absent(tmp_path):
    def broken(folder):
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.cached_folder("thing", broken)
    assert list((tmp_path / "cache").iterdir()) == []
    made = cache.cached_folder("thing", lambda folder: (folder / "whole").write_text("whole") and None)
    assert [path.name for path in made.iterdir()] == ["whole"]
    assert cache.cached_folder("thing", broken) == made


def test_another_process_that_was_first_wins(tmp_path):
    def late(folder):
        first = cache.cache_folder() / "thing"
        first.mkdir()
        (first / "mark").write_text("first")

    assert (cache.cached_folder("thing", late) / "mark").read_text() == "first"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["thing"]


MAKER = """
import pathlib, sys, time
from qat.text import cache

def fill(folder):
    (folder / "part").touch()
    print(folder, flush=True)
    time.sleep(300)

cache.cached_folder("thing", fill)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs the signals of POSIX")
def test_what_a_killed_process_left_is_removed_and_what_a_living_one_fills_is_not(tmp_path):
    with subprocess.Popen([sys.executable, "-c", MAKER], stdout=subprocess.PIPE, text=True) as living:
        try:
            filled = Path(living.stdout.readline().strip())
            assert filled.parent == tmp_path / "cache"
            cache.cached_folder("thing", lambda folder: None).rmdir()
            assert (filled / "part").exists()
        finally:
            living.kill()
    assert filled.exists()
    other = filled.with_name(".things-1")
    other.mkdir()
    made = cache.cached_folder("thing", lambda folder: None)
    assert set(made.parent.iterdir()) == {made, other}


def test_a_cache_that_cannot_be_written_says_how_to_move_it(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("QAT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match="set QAT_CACHE"):
        cache.cached_folder("thing", lambda folder: None)


def test_the_key_of_the_cache_tells_texts_and_settings_apart():
    keys = {cache.cache_key(*given) for given in [(["ab"], {}), (["a", "b"], {}), (["ab", ""], {}), (["ab"], {"n": 1})]}
    assert len(keys) == 4
    assert cache.cache_key(["ab"], {"n": 1, "m": 2}) == cache.cache_key(iter(["ab"]), {"m": 2, "n": 1})
