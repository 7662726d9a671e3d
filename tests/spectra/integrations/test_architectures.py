import pytest
import saved_encoders
import saved_models
import transformers

from spectra.backend.errors import InputError
from spectra.integrations.architectures import CAUSAL, IMAGE, MASKED, OTHER, SEQUENCE, kind_of
from spectra.integrations.loading import load_causal_lm, load_model


def config(family, architecture, **options):
    made = transformers.AutoConfig.for_model(family, **options)
    made.architectures = [architecture] if architecture else None
    return made


@pytest.mark.parametrize(
    ("family", "architecture", "kind"),
    [
        ("llama", "LlamaForCausalLM", CAUSAL),
        ("gpt2", "GPT2LMHeadModel", CAUSAL),
        ("bert", "BertLMHeadModel", CAUSAL),
        ("xlnet", "XLNetLMHeadModel", CAUSAL),
        ("bert", "BertForMaskedLM", MASKED),
        ("distilbert", "DistilBertForMaskedLM", MASKED),
        ("roberta", "RobertaForSequenceClassification", SEQUENCE),
        ("llama", "LlamaForSequenceClassification", SEQUENCE),
        ("vit", "ViTForImageClassification", IMAGE),
        ("resnet", "ResNetForImageClassification", IMAGE),
        ("bert", "BertModel", OTHER),
        ("bert", "BertForPreTraining", OTHER),
        ("bert", "BertForTokenClassification", OTHER),
        ("t5", "T5ForConditionalGeneration", OTHER),
        ("bart", "BartForConditionalGeneration", OTHER),
        ("llama", None, CAUSAL),
        ("bert", None, OTHER),
        ("vit", None, OTHER),
    ],
)
def test_the_kind_follows_from_the_class_that_the_config_names(family, architecture, kind):
    assert kind_of(config(family, architecture)) is kind


def test_code_that_a_model_brings_may_say_that_it_is_a_language_model():
    own = config("llama", "OwnModel")
    assert kind_of(own) is OTHER
    own.auto_map = {"AutoModelForCausalLM": "own.Model"}
    assert kind_of(own) is CAUSAL


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ("BertForMaskedLM", "its config.json names BertForMaskedLM, a masked language model: give another model"),
        ("BertForSequenceClassification", "BertForSequenceClassification, a sequence classifier"),
        ("BertForTokenClassification", "its config.json names BertForTokenClassification: give another model"),
    ],
)
def test_an_encoder_is_no_causal_language_model(head, words, tmp_path):
    """transformers would make one of it."""
    saved_encoders.save_bert(tmp_path, head)
    with pytest.raises(InputError, match="expected a causal language model in") as refused:
        load_causal_lm(tmp_path)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_kind_loads_with_its_own_class(tmp_path):
    for head, kind in (("BertForMaskedLM", MASKED), ("BertForSequenceClassification", SEQUENCE), ("BertModel", OTHER)):
        folder = saved_encoders.save_bert(tmp_path / head, head)
        assert type(load_model(folder, kind=kind)).__name__ == head
    assert (
        type(load_model(saved_encoders.save_vit(tmp_path / "vit"), kind=IMAGE)).__name__ == "ViTForImageClassification"
    )
    assert type(load_model(saved_models.save(tmp_path / "lm"), kind=OTHER)).__name__ == "LlamaForCausalLM"


def test_a_checkpoint_without_its_head_is_refused(tmp_path):
    saved_encoders.save_bert(tmp_path, "BertModel")
    with pytest.raises(
        InputError, match=r"lacks \d+ of the model's weights, .*: give the checkpoint of a whole masked"
    ):
        load_model(tmp_path, kind=MASKED)
