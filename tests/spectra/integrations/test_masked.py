import pytest
import saved_encoders
import saved_models
import torch

from spectra import HessianOperator
from spectra.backend.errors import InputError
from spectra.integrations.masked import masked_batches

TEXTS = [saved_models.TEXT]


@pytest.fixture(scope="module")
def loaded():
    return saved_encoders.bert("BertForMaskedLM"), saved_encoders.tokenizer()


def test_sequences_begin_and_end_with_the_tokenizers_tokens_and_hold_the_text(loaded):
    model, tokenizer = loaded
    batches, _ = masked_batches(model, tokenizer, TEXTS, sequences=5, length=10, batch_size=2)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 10), (2, 10), (1, 10)]
    ids, labels = (torch.cat([batch[name] for batch in batches]) for name in ("input_ids", "labels"))
    assert (ids[:, 0] == tokenizer.cls_token_id).all()
    assert (ids[:, -1] == tokenizer.sep_token_id).all()
    whole = torch.where(labels == -100, ids, labels)[:, 1:-1].flatten().tolist()
    tokens = tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    pieces = [tokens[at : at + 8] for at in range(0, len(tokens) - 7, 8)]
    assert whole == [token for i in range(5) for token in pieces[i * len(pieces) // 5]]


def test_the_masks_are_counted_seeded_and_leave_special_tokens_alone(loaded):
    model, tokenizer = loaded
    draw = [masked_batches(model, tokenizer, TEXTS, sequences=40, length=16, share=0.3, seed=s) for s in (0, 0, 1)]
    (one, note), (again, _), (other, _) = draw
    assert all(torch.equal(a[k], b[k]) for a, b in zip(one, again, strict=True) for k in a)
    assert any(not torch.equal(a["labels"], b["labels"]) for a, b in zip(one, other, strict=True))
    ids, labels = (torch.cat([batch[name] for batch in one]) for name in ("input_ids", "labels"))
    predicted = labels != -100
    special = torch.tensor(tokenizer.all_special_ids)
    assert not torch.isin(labels[predicted], special).any()
    text_tokens = (~torch.isin(torch.where(predicted, labels, ids), special)).sum(dim=1)
    assert predicted.sum(dim=1).tolist() == [max(1, round(0.3 * count)) for count in text_tokens.tolist()]
    hidden = int((ids[predicted] == tokenizer.mask_token_id).sum())
    total = int(predicted.sum())
    assert 0.7 < hidden / total < 0.9
    kept = int((ids[predicted] == labels[predicted]).sum())
    assert 0.04 < kept / total < 0.2
    assert note.startswith(f"masked-token loss of {total} of 640 tokens (seed 0): {hidden} replaced by [MASK], ")


def test_the_loss_is_the_mean_over_the_masked_tokens(loaded):
    model, tokenizer = loaded
    batches, _ = masked_batches(model, tokenizer, TEXTS, sequences=5, length=16, batch_size=3, share=0.25)
    total, count = 0.0, 0
    for batch in batches:
        logits = model(batch["input_ids"]).logits.double()
        chosen = batch["labels"] != -100
        picked = logits[chosen].gather(-1, batch["labels"][chosen][:, None])[:, 0]
        total += (torch.logsumexp(logits[chosen], -1) - picked).sum().item()
        count += int(chosen.sum())
    with HessianOperator(model, batches) as op:
        assert op.loss() == pytest.approx(total / count, rel=1e-5)


def test_the_length_is_at_most_the_models_and_the_tokenizers(loaded):
    model, tokenizer = loaded
    (batch,), _ = masked_batches(model, tokenizer, TEXTS, sequences=2)
    assert batch["input_ids"].shape == (2, 16)
    short = saved_encoders.tokenizer()
    short.model_max_length = 12
    (batch,), _ = masked_batches(model, short, TEXTS, sequences=2)
    assert batch["input_ids"].shape == (2, 12)


def test_what_cannot_be_masked_is_refused(loaded):
    model, tokenizer = loaded
    with pytest.raises(InputError, match="the tokenizer has no mask token"):
        masked_batches(model, saved_models.tokenizer(), TEXTS)
    for share in (0.0, 1.0, -0.1):
        with pytest.raises(InputError, match="share of masked tokens between 0 and 1"):
            masked_batches(model, tokenizer, TEXTS, share=share)
    with pytest.raises(InputError, match="a length of 4 to 16 tokens for this model, got 3"):
        masked_batches(model, tokenizer, TEXTS, length=3)
    with pytest.raises(InputError, match="no token that can be masked"):
        masked_batches(model, tokenizer, ["123 456 789 " * 40], sequences=2)
    with pytest.raises(InputError, match="the text is too short"):
        masked_batches(model, tokenizer, ["abc"])
    with pytest.raises(InputError, match="batches of one sequence or more, got 0"):
        masked_batches(model, tokenizer, TEXTS, batch_size=0)
