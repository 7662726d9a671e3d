"""Other people's training programs, with the probe and without: the same weights, bit for bit; the right records."""

import pytest
import tiny_models
import torch
from oracles import random_state, same_random_state

import spectra

transformers = pytest.importorskip("transformers")

OPTIONS = {"probes": 2, "steps": 4, "deflate": 0, "count_products": 0, "strict": True}
BATCHES = tiny_models.token_batches()


def language_model(dropout=0.1):
    model = tiny_models.causal_lm("gpt2", dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return model.train()


def assert_unnoticed(train, steps):
    """What `train(None)` and `train(log)` leave is the same. The latter returns its probe too."""
    torch.manual_seed(5)
    plain, _ = train(None)
    before = random_state()
    logged = {}
    torch.manual_seed(5)
    watched, probe = train(lambda values, step: logged.update({step: values}))
    assert same_random_state(before, random_state())
    pairs = zip(plain.state_dict().items(), watched.state_dict().items(), strict=True)
    assert all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)
    assert [record.step for record in probe.records] == steps
    assert len({record.loss for record in probe.records}) == len(steps)  # taken at weights that move
    assert list(logged) == steps
    for record in probe.records:
        assert logged[record.step]["spectra/lambda_max_high"] == record.estimates["lambda_max"].high
    return plain, probe


def loop(model, probe, loss, steps=5):
    """A plain loop over the parameters that are trained."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for i in range(steps):
        value = loss(model, i)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        if probe is not None:
            probe.step(i + 1, loss=value)
    if probe is not None:
        probe.close()
    return model, probe


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    ids = torch.randint(2, tiny_models.VOCABULARY, (12, 8), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row.clone()} for row in ids]

    def train(log):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = language_model()
        loader = torch.utils.data.DataLoader(rows, batch_size=2, shuffle=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        inner, done, probe = accelerator.unwrap_model(model), 0, None
        if log is not None:
            probe = spectra.SpectrumProbe(inner, BATCHES, every=2, log=log, params="*mlp*", **OPTIONS)
        for _ in range(2):
            for batch in loader:
                with accelerator.accumulate(model):
                    loss = model(**batch).loss
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients:
                    done += 1
                    if probe is not None:
                        probe.step(done, loss=loss)
        return inner, probe

    assert_unnoticed(train, [1, 2, 4, 6])


def test_peft():
    """The adapters alone are measured: the spectrum is that of the same loss over them, dense."""
    peft = pytest.importorskip("peft")

    def train(log):
        torch.manual_seed(1)
        lora = peft.LoraConfig(r=2, lora_dropout=0.1, target_modules=["c_attn"], fan_in_fan_out=True)
        model = peft.get_peft_model(language_model(), lora)
        probe = None
        if log is not None:
            probe = spectra.SpectrumProbe(model, BATCHES, every=2, log=log, **{**OPTIONS, "steps": 200})
        return loop(model, probe, lambda model, i: model(**BATCHES[i % 2]).loss)

    model, probe = assert_unnoticed(train, [1, 2, 4, 5])
    record = probe.records[-1]
    assert record.dimension == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert all("lora" in name for name, p in model.named_parameters() if p.requires_grad)
    values = torch.linalg.eigvalsh(torch.as_tensor(spectra.HessianOperator(model, BATCHES).to_dense()).double())
    assert record.estimates["lambda_max"].value == pytest.approx(float(values.max()), rel=1e-4)
    assert record.estimates["rms"].low <= float(values.square().mean().sqrt()) <= record.estimates["rms"].high


def test_transformer_lens():
    lens = pytest.importorskip("transformer_lens")
    shape = {"d_model": 8, "d_head": 4, "n_heads": 2, "n_layers": 1, "n_ctx": 16, "act_fn": "gelu", "seed": 0}
    config = lens.TransformerBridgeConfig(**shape, d_vocab=tiny_models.VOCABULARY)
    tokens = [torch.randint(2, tiny_models.VOCABULARY, (3, 8)) for _ in range(2)]

    def loss(model, batch):
        return model(batch, return_type="loss")

    def train(log):
        model, probe = lens.TransformerBridge.boot_native(config).train(), None
        if log is not None:
            probe = spectra.SpectrumProbe(model, tokens[:1], loss=loss, every=2, log=log, **OPTIONS)
        return loop(model, probe, lambda model, i: loss(model, tokens[i % 2]))

    model, probe = assert_unnoticed(train, [1, 2, 4, 5])
    with torch.no_grad():
        logits = model.eval()(tokens[0])[:, :-1]
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[0][:, 1:].flatten())
    assert probe.records[-1].loss == pytest.approx(float(want), rel=1e-5)


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<eos>": 0, "<pad>": 1, **{f"w{i}": i for i in range(2, tiny_models.VOCABULARY)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def test_trl(tmp_path):
    """SFTTrainer's loss is the next-token loss from the logits; its own logs do not change, nor what they average."""
    pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from trl import SFTConfig, SFTTrainer

    draws = torch.randint(2, tiny_models.VOCABULARY, (8, 9), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [" ".join(f"w{i}" for i in row[: 4 + k % 5]) for k, row in enumerate(draws)]
    histories = []

    def train(log):
        model, callbacks = language_model(), []
        if log is not None:
            callback = spectra.SpectrumCallback(every=2, batch_count=2, **OPTIONS)
            callbacks.append(callback)
        arguments = SFTConfig(
            str(tmp_path / str(log is None)),
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            logging_steps=2,
            disable_tqdm=True,
        )
        data = datasets.Dataset.from_dict({"text": texts})
        trainer = SFTTrainer(
            model, args=arguments, train_dataset=data, processing_class=tokenizer(), callbacks=callbacks
        )
        trainer.train()
        histories.append(trainer.state.log_history)
        if log is None:
            return model, None
        for entry in trainer.state.log_history:
            if "spectra/loss" in entry:
                log(entry, entry["step"])
        return model, callback.probe

    model, probe = assert_unnoticed(train, [0, 2, 4])
    own = [
        [
            {key: entry[key] for key in ("step", "loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")}
            for entry in history
            if "loss" in entry
        ]
        for history in histories
    ]
    assert own[0] == own[1]
    batches = [{name: batch[name] for name in ("input_ids", "attention_mask", "labels")} for batch in probe.batches]
    labels = [batch["labels"] != -100 for batch in batches]
    predicted, counted = sum(int(each[:, 1:].sum()) for each in labels), sum(int(each.sum()) for each in labels)
    with torch.no_grad():
        loss = tiny_models.language_loss(model.eval(), batches)
    # the Trainer divides by all labels, those that nothing predicts among them
    assert probe.records[-1].loss == pytest.approx(float(loss) * predicted / counted, rel=1e-5)
