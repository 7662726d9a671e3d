import numpy as np
import pytest
import saved_encoders
import saved_models
import torch
from PIL import Image

from spectra import HessianOperator
from spectra.backend.errors import InputError
from spectra.integrations.architectures import IMAGE
from spectra.integrations.labelled import image_batches, labelled_batches, read_labelled
from spectra.integrations.loading import load_model

NAMES = {"id2label": {0: "cat", 1: "dog", 2: "eel"}, "label2id": {"cat": 0, "dog": 1, "eel": 2}}


def classifier(**options):
    return saved_encoders.bert("BertForSequenceClassification", **{"num_labels": 3, **options})


def test_three_forms_of_file_hold_the_same_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"text": "one, two", "label": 1}\n\n{"text": "x", "text_pair": "y", "label": 0}\n'
    )
    (tmp_path / "a.csv").write_text('text,label,text_pair\n"one, two",1,\nx,0,y\n')
    (tmp_path / "a.tsv").write_text("label\ttext\ttext_pair\n1\tone, two\t\n0\tx\ty\n")
    want = [("one, two", None, "1"), ("x", "y", "0")]
    for name in ("a.jsonl", "a.csv", "a.tsv"):
        assert [(text, pair, str(label)) for text, pair, label in read_labelled([tmp_path / name])] == want
    assert len(read_labelled([tmp_path / "a.csv", tmp_path / "a.tsv"])) == 4


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", '{"text": "x"}\n', "line 1 of .* has no label"),
        ("a.jsonl", '{"text": "x", "label": 0}\nnonsense\n', r"line 2 of .* is no JSON"),
        ("a.jsonl", "[1, 2]\n", "line 1 of .* has no text"),
        ("a.csv", "sentence,label\nx,0\n", "line 2 of .* has no text"),
        ("a.tsv", "text\tlabel\nx\n", "line 2 of .* has no label"),
        ("a.txt", "x\n", r"expected labelled text in a \.jsonl"),
    ],
)
def test_a_file_of_another_form_is_refused_with_the_line(name, text, words, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=words):
        read_labelled([tmp_path / name])


def test_rows_become_padded_batches_whose_loss_is_the_mean_over_rows():
    model, tokenizer = classifier(), saved_encoders.tokenizer()
    rows = [(row["text"], None, row["label"]) for row in saved_encoders.some_rows(12)]
    batches = labelled_batches(model, tokenizer, rows, sequences=6, batch_size=4)
    assert [len(batch["labels"]) for batch in batches] == [4, 2]
    assert [int(label) for batch in batches for label in batch["labels"]] == [rows[2 * i][2] for i in range(6)]
    assert any((batch["attention_mask"] == 0).any() for batch in batches)
    losses = []
    for text, _, label in rows[::2]:  # one by one, without padding
        logits = model(**tokenizer(text, return_tensors="pt")).logits[0].double()
        losses.append((torch.logsumexp(logits, 0) - logits[label]).item())
    with HessianOperator(model, batches) as op:
        assert op.loss() == pytest.approx(np.mean(losses), rel=1e-5)


def test_labels_may_be_names_numbers_or_values():
    tokenizer = saved_encoders.tokenizer()
    rows = [("abc", "def", "dog"), ("bcd", None, "0"), ("cde", None, 2)]
    (batch,) = labelled_batches(classifier(**NAMES), tokenizer, rows, sequences=3)
    assert batch["labels"].tolist() == [1, 0, 2]
    assert batch["input_ids"][0].tolist().count(tokenizer.sep_token_id) == 2
    (batch,) = labelled_batches(classifier(num_labels=1), tokenizer, [("a", None, "1.5"), ("b", None, 2)], sequences=2)
    assert batch["labels"].tolist() == [1.5, 2.0]


def test_rows_that_do_not_fit_the_model_are_refused():
    tokenizer = saved_encoders.tokenizer()
    for model, rows, options, words in (
        (classifier(), [("a", None, "good")], {}, r"label 'good' is none of the model's 3 classes \(LABEL_0, .*0 to 2"),
        (classifier(num_labels=1), [("a", None, "good")], {}, "labels are numbers"),
        (classifier(problem_type="multi_label_classification"), [("a", None, 0)], {}, "give its loss with --loss"),
        (classifier(), [("a", None, 0)], {"sequences": 2}, "2 rows are asked for and there are 1"),
        (classifier(), [("a", None, 0)], {"length": 17}, "a length of 2 to 16"),
    ):
        with pytest.raises(InputError, match=words):
            labelled_batches(model, tokenizer, rows, **{"sequences": 1, **options})
    tokenizer.pad_token = None
    with pytest.raises(InputError, match=r"no padding token.*--batch-size 1"):
        labelled_batches(classifier(), tokenizer, [("a", None, 0)], sequences=1)
    (batch,) = labelled_batches(classifier(), tokenizer, [("a", None, 0)], sequences=1, batch_size=1)
    assert batch["input_ids"].shape == (1, 3)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = saved_encoders.save_vit(tmp_path_factory.mktemp("vit"), **NAMES)
    return load_model(folder, kind=IMAGE), str(folder)


def test_images_of_each_class_become_batches(vit, tmp_path):
    model, name = vit
    folder = saved_encoders.write_images(tmp_path)
    (folder / "dog" / "notes.txt").write_text("no image")
    batches = image_batches(model, name, folder, images=6, batch_size=4)
    assert [tuple(batch["pixel_values"].shape) for batch in batches] == [(4, 3, 8, 8), (2, 3, 8, 8)]
    assert [int(label) for batch in batches for label in batch["labels"]] == [0, 0, 1, 1, 2, 2]
    with Image.open(folder / "dog" / "0.png") as picture:  # the fifth of twelve files, the third that is taken
        small = np.asarray(picture.resize((8, 8), Image.Resampling.BILINEAR), dtype=float)
    want = torch.tensor((small / 255 - 0.5) / 0.5).permute(2, 0, 1)
    torch.testing.assert_close(batches[0]["pixel_values"][2].double(), want, atol=1e-5, rtol=1e-5)
    losses = []
    for batch in batches:
        logits = model(batch["pixel_values"]).logits.double()
        losses += (torch.logsumexp(logits, 1) - logits.gather(1, batch["labels"][:, None])[:, 0]).tolist()
    with HessianOperator(model, batches) as op:
        assert op.loss() == pytest.approx(np.mean(losses), rel=1e-5)


def test_classes_without_names_are_taken_in_alphabetical_order(tmp_path):
    name = saved_encoders.save_vit(tmp_path / "vit")
    model = load_model(name, kind=IMAGE)
    folder = saved_encoders.write_images(tmp_path / "images", classes=("b", "a", "c"), each=1)
    (batch,) = image_batches(model, str(name), folder, images=3)
    assert batch["labels"].tolist() == [0, 1, 2]


def test_folders_and_files_that_cannot_be_used_are_refused(vit, tmp_path):
    model, name = vit
    (tmp_path / "none").mkdir()
    damaged = saved_encoders.write_images(tmp_path / "damaged")
    (damaged / "cat" / "0.png").write_text("no image")
    strange = saved_encoders.write_images(tmp_path / "strange", classes=("cat", "yak"))
    for folder, words in (
        (tmp_path / "nowhere", "there is no folder"),
        (tmp_path / "none", "a folder for each class in .*, but it holds none"),
        (damaged, r"0\.png cannot be read as an image"),
        (strange, r"folder yak is none of the model's 3 classes \(cat, dog, eel"),
    ):
        with pytest.raises(InputError, match=words) as refused:
            image_batches(model, name, folder, images=8)
        assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match="99 images are asked for and there are 12"):
        image_batches(model, name, saved_encoders.write_images(tmp_path / "few"), images=99)
    with pytest.raises(InputError, match=r"expected an image processor in .* holds none of its files"):
        image_batches(model, str(saved_models.save(tmp_path / "lm")), tmp_path / "few", images=2)
