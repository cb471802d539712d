"""Data sets become prompts; malformed rows are reported with file and line."""

import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from tiny import EOS, save_tiny, tiny_tokenizer

from switchkd.config.errors import ConfigError
from switchkd.config.schema import DataConfig, ModelConfig
from switchkd.data import dataset
from switchkd.data.prompts import LAYER_TOKENS, PromptStream, answer_end, layer_texts, load_prompts
from switchkd.engines.models import hub


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def jsonl(folder: Path, *rows: object, name: str = "data.jsonl") -> str:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def load(path: str, tokenizer, need_references: bool = False, **data):
    return load_prompts(DataConfig(path=path, **data), tokenizer, stop_id=EOS, need_references=need_references)


def test_a_row_becomes_a_prompt(tmp_path, tokenizer):
    """A row becomes the chat-templated prompt, the reference with the stop id, and its extra fields."""
    row = {"id": 7, "prompt": "hi there", "reference": "yes", "references": ["yes", "ok"], "answer": 42}
    loaded = load(jsonl(tmp_path, row), tokenizer)
    (prompt,) = loaded.prompts
    assert tokenizer.decode(prompt.token_ids) == "<user>hi there<assistant>"
    assert tokenizer.decode(prompt.reference_ids) == "yes<eos>" and prompt.reference_ids[-1] == EOS
    assert (prompt.prompt_id, prompt.text, prompt.references) == ("7", "hi there", ("yes", "ok"))
    assert (prompt.answer, prompt.teacher) == ("42", "")
    assert prompt.token_ids.dtype == prompt.reference_ids.dtype == np.int32
    assert loaded.num_skipped == 0 and loaded.report() == "1 prompts"


def test_the_last_assistant_message_is_the_reference(tmp_path, tokenizer):
    """The assistant's last message is the reference, the messages before it the prompt after `data.system`."""
    chat = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = {"chat": [{"role": role, "content": text} for role, text in chat]}
    (prompt,) = load(jsonl(tmp_path, row), tokenizer, messages_field="chat", system="S").prompts
    assert tokenizer.decode(prompt.token_ids).startswith("<system>S<user>a<assistant>b<eos><user>c<assistant>")
    assert (prompt.text, prompt.reference) == ("c", "d")


SPELLED = "a<eos>b <assistant>no <user>"


@pytest.mark.parametrize(
    ("data", "before", "after"),
    [
        ({}, "<user>", "<assistant>"),
        ({"template": "<user>Q:{prompt}<assistant>"}, "<user>Q:", "<assistant>"),
        ({"messages_field": "chat", "system": "the <unk>"}, "<system>the <unk><user>", "<assistant>"),
    ],
)
def test_special_tokens_in_a_prompt_are_escaped(tmp_path, tokenizer, data, before, after):
    """With `escape_special` no special token of a prompt's text is real, the template's own are, and a prompt without
    any keeps its token ids; without it they are real."""
    rows = [
        {"prompt": text, "chat": [{"role": "user", "content": text}], "reference": "yes"}
        for text in (SPELLED, "an in<user text>")
    ]
    path = jsonl(tmp_path, *rows)
    real, escaped = (load(path, tokenizer, escape_special=on, **data).prompts for on in (False, True))
    assert real[1].token_ids.tolist() == escaped[1].token_ids.tolist()
    frame = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, after)]
    ids = escaped[0].token_ids.tolist()
    assert ids[: len(frame[0])] == frame[0] and ids[-len(frame[1]) :] == frame[1]
    inside = ids[len(frame[0]) : -len(frame[1])]
    special = set(tokenizer.all_special_ids) | {3, 4}
    assert special.isdisjoint(set(inside) - {tokenizer.unk_token_id}), tokenizer.convert_ids_to_tokens(inside)
    assert EOS in real[0].token_ids and len(real[0].token_ids) < len(ids)
    assert escaped[0].text.replace("\u200b", "") == real[0].text == SPELLED


def test_special_tokens_that_cannot_be_escaped_are_refused(tmp_path, tokenizer):
    """A tokenizer that drops zero-width spaces is refused where a prompt spells a special token."""
    from tokenizers import AddedToken, normalizers

    dropping = tiny_tokenizer()
    dropping.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    dropping.add_special_tokens({"additional_special_tokens": [AddedToken("<over>", special=True, normalized=True)]})
    path = jsonl(tmp_path, {"prompt": "it is <over>"})
    with pytest.raises(ConfigError, match=r"data.jsonl:1: data.escape_special cannot break"):
        load(path, dropping, escape_special=True)


def chat_row(*texts: str, **fields: object) -> dict:
    """A row of a conversation whose roles alternate, the user's first."""
    return {"m": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)], **fields}


def test_a_conversation_that_ends_with_a_user_turn_is_the_prompt(tmp_path, tokenizer):
    """A conversation that ends with a user turn is the whole prompt; its reference is that of the reference field."""
    rows = [
        chat_row("a", "b", "c"),
        chat_row("a", "b", "c", reference="d"),
        chat_row("a", "b", "c", reference=["e", "f"]),
    ]
    prompts = load(jsonl(tmp_path, *rows), tokenizer, messages_field="m").prompts
    assert {tokenizer.decode(one.token_ids) for one in prompts} == {"<user>a<assistant>b<eos><user>c<assistant>"}
    assert [(one.text, one.reference, one.references) for one in prompts] == [
        ("c", "", ()), ("c", "d", ()), ("c", "e", ("e", "f"))
    ]  # fmt: skip
    assert [len(one.reference_ids) > 0 for one in prompts] == [False, True, True]


def test_two_references_of_a_conversation_are_refused(tmp_path, tokenizer):
    """A reference field beside a conversation that ends with an answer is refused; `references` for metrics are not."""
    (prompt,) = load(jsonl(tmp_path, chat_row("a", "b", references=["c"])), tokenizer, messages_field="m").prompts
    assert (prompt.reference, prompt.references) == ("b", ("c",))
    path = jsonl(tmp_path, chat_row("a", "b"), chat_row("a", "b", reference="c"))
    with pytest.raises(ConfigError, match=r"data.jsonl:2: the last message of 'm' and the field 'reference' .* both"):
        load(path, tokenizer, messages_field="m")
    assert load(path, tokenizer, messages_field="m", reference_field="other").prompts[1].reference == "b"


def test_conversations_without_a_reference_are_counted(tmp_path, tokenizer):
    """Where references are needed a conversation without one is skipped and counted; if all lack it, one line says what
    needs them."""
    path = jsonl(tmp_path, *[chat_row("a", "b")] * 9, chat_row("a"))
    loaded = load(path, tokenizer, need_references=True, messages_field="m")
    assert loaded.skipped == {"no reference": 1} and loaded.report() == "9 prompts, 1 skipped (no reference)"
    path = jsonl(tmp_path, *[chat_row("a", "b", "c")] * 3)
    message = r"3 of 3 prompts cannot be used \(3 no reference\).*'reference' \(data.reference_field\).*mix.dataset"
    with pytest.raises(ConfigError, match=message):
        load(path, tokenizer, need_references=True, messages_field="m")
    assert len(load(path, tokenizer, messages_field="m").prompts) == 3


def test_an_answer_is_enough_for_exact_match(tmp_path, tokenizer):
    """Where answers are needed, a row with an `answer` or a reference is used."""
    rows = [{"prompt": "a", "answer": 1}, {"prompt": "a", "reference": "1"}, {"prompt": "a"}]
    path = jsonl(tmp_path, *rows)
    loaded = load_prompts(DataConfig(path=path, max_skipped_frac=0.5), tokenizer, stop_id=EOS, need_answers=True)
    assert loaded.skipped == {"no reference": 1}


def test_template_replaces_the_chat_template(tmp_path, tokenizer):
    """`template` replaces the chat template; a tokenizer without a chat template gets the bare prompt."""
    path = jsonl(tmp_path, {"prompt": "x {y}", "reference": ""})
    (prompt,) = load(path, tokenizer, template="Q: {prompt}\nA: ").prompts
    assert tokenizer.decode(prompt.token_ids) == "Q: x {y}\nA: " and len(prompt.reference_ids) == 0
    bare = tiny_tokenizer()
    bare.chat_template = None
    (prompt,) = load(path, bare).prompts
    assert bare.decode(prompt.token_ids) == "x {y}"


def test_a_chat_template_writes_the_given_date(tmp_path):
    """A chat template that asks for today's date gets `data.date`."""
    dated = tiny_tokenizer()
    dated.chat_template = "{{ strftime_now('%d %b %Y') }}" + dated.chat_template
    path = jsonl(tmp_path, {"prompt": "x", "reference": "y"})
    (prompt,) = load(path, dated, date="2024-02-29").prompts
    assert dated.decode(prompt.token_ids) == "29 Feb 2024<user>x<assistant>"


def test_a_prompt_has_one_start_token(tmp_path):
    """A prompt has one start token, whether the tokenizer or the template adds it."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<user>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<user> $A <eos>", special_tokens=[("<user>", 3), ("<eos>", EOS)]
    )
    path = jsonl(tmp_path, {"prompt": "x", "reference": "y"})
    assert tokenizer.decode(load(path, tokenizer, template="{prompt}").prompts[0].token_ids) == "<user>x"
    assert tokenizer.decode(load(path, tokenizer, template="<user>{prompt}").prompts[0].token_ids) == "<user>x"
    chat = load(path, tokenizer).prompts[0]
    assert tokenizer.decode(chat.token_ids) == "<user>x<assistant>"
    assert tokenizer.decode(chat.reference_ids) == "y<eos>"


def test_a_reference_ends_as_the_template_ends_answers(tokenizer):
    """A reference ends with the stop id that the chat template writes, not with the tokenizer's end of text."""
    several = tiny_tokenizer()
    several.eos_token = "<pad>"
    assert answer_end(DataConfig(), several, [EOS, several.eos_token_id]) == EOS
    assert answer_end(DataConfig(template="{prompt}"), several, [EOS]) == several.eos_token_id
    several.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-sequence"):
        answer_end(DataConfig(template="{prompt}"), several, [EOS])


def test_skipped_and_cut_are_counted(tmp_path, tokenizer):
    """Long and empty prompts are skipped, long references are cut without a stop id, and the report counts both."""
    rows = [
        {"prompt": "q" * 50, "reference": "r"},
        {"prompt": " ", "reference": "r"},
        {"prompt": None, "reference": "r"},
    ]
    rows += [{"prompt": "ok", "reference": "zzzzz"}, {"prompt": "ok", "reference": "zzzz"}]
    loaded = load(jsonl(tmp_path, *rows), tokenizer, max_prompt_tokens=9, max_reference_tokens=5, max_skipped_frac=0.6)
    assert loaded.skipped == {"over max_prompt_tokens": 1, "empty prompt": 2} and loaded.num_skipped == 3
    assert [list(p.reference_ids).count(EOS) for p in loaded.prompts] == [0, 1]
    assert loaded.num_cut == 1 and len(loaded.prompts[0].reference_ids) == 5
    skipped = "1 skipped (over max_prompt_tokens), 2 skipped (empty prompt)"
    assert loaded.report() == f"2 prompts, {skipped}, 1 references cut at max_reference_tokens"


def test_too_many_skipped_prompts_are_an_error(tmp_path, tokenizer):
    """More than max_skipped_frac is an error with the counts, the limit and the longest prompt."""
    rows = [{"prompt": "p" * 30}] * 2 + [{"prompt": "p"}] * 8
    with pytest.raises(
        ConfigError, match=r"2 of 10 prompts .*2 over max_prompt_tokens.*=0.1 .* is 20, .* has 32 tokens"
    ):
        load(jsonl(tmp_path, *rows), tokenizer, max_prompt_tokens=20)


def test_missing_references_are_refused_if_needed(tmp_path, tokenizer):
    """If references are needed, a file without the field is an error, and a row with an empty one is skipped."""
    with pytest.raises(ConfigError, match=r"data.jsonl:1: no field 'reference', only 'prompt', 'output'"):
        load(jsonl(tmp_path, {"prompt": "a", "output": "b"}), tokenizer, need_references=True)
    rows = [{"prompt": "a", "reference": "b"}] * 9 + [{"prompt": "a", "reference": ""}]
    assert load(jsonl(tmp_path, *rows), tokenizer, need_references=True).skipped == {"no reference": 1}
    several = jsonl(tmp_path, {"prompt": "a", "references": ["b", "c"]})
    assert load(several, tokenizer, need_references=True).prompts[0].reference == "b"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"prompt": "a"}', '{"prompt": '], r"data.jsonl:2: not JSON \(.*column"),
        (['{"prompt": "a"}', "", "[1]"], r"data.jsonl:3: a list, not an object"),
        (['{"question": "a", "id": 1}'], r"data.jsonl:1: no field 'prompt', only 'question', 'id'; set"),
        (['{"prompt": ["a"]}'], r"data.jsonl:1: field 'prompt' is a list, not a text"),
        (['{"prompt": 5}'], r"data.jsonl:1: field 'prompt' is a number, not a text"),
        (['{"prompt": "a", "reference": {}}'], r"data.jsonl:1: field 'reference' is an object, not a text"),
        (['{"prompt": "a", "references": "b"}'], r"data.jsonl:1: field 'references' is a text, not a list of texts"),
        (['{"prompt": "\\ud800"}'], r"data.jsonl:1: field 'prompt' holds half a surrogate pair"),
        (["", ""], r"holds no rows"),
    ],
)
def test_malformed_rows_are_reported_with_their_place(tmp_path, tokenizer, lines, message):
    """A malformed row is reported in one line with its place."""
    with pytest.raises(ConfigError, match=message) as error:
        load(jsonl(tmp_path, *lines), tokenizer)
    assert "\n" not in str(error.value)


def test_bytes_that_are_not_utf8_are_an_error(tmp_path, tokenizer):
    """Bytes that are not UTF-8 are reported with their line."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xe9"}\n')
    with pytest.raises(ConfigError, match=r"data.jsonl:2: not UTF-8"):
        load(str(path), tokenizer)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "is a text, not a list of messages"),
        ([{"role": "user"}], "message 0 of 'm' needs a role and a content"),
    ],
)
def test_malformed_messages_are_an_error(tmp_path, tokenizer, messages, message):
    """A message without role and content is an error."""
    with pytest.raises(ConfigError, match=message):
        load(jsonl(tmp_path, {"m": messages}), tokenizer, messages_field="m")


def test_missing_and_unknown_files_are_errors(tmp_path, tokenizer):
    """A missing file, a folder and an unknown ending are errors."""
    for name, message in (
        ("no.jsonl", "does not exist"),
        ("", "is a folder"),
        ("x.csv", "'?.csv'? ending is not known"),
    ):
        (tmp_path / "x.csv").write_text("a,b")
        with pytest.raises(ConfigError, match=message):
            load(str(tmp_path / name), tokenizer)


def test_contradicting_keys_are_refused(tmp_path, tokenizer):
    """Contradicting `data` keys are refused."""
    path = jsonl(tmp_path, {"prompt": "a"})
    for data in (
        {"messages_field": "m", "template": "{prompt}"},
        {"system": "S", "template": "{prompt}"},
    ):
        with pytest.raises(ConfigError, match=r"data\."):
            load(path, tokenizer, **data)


def test_an_error_of_the_template_is_reported(tmp_path):
    """An error of the chat template is reported with the row's place."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ConfigError, match=r"data.jsonl:1: the chat template refuses .* System role not supported"):
        load(jsonl(tmp_path, {"prompt": "a"}), tokenizer, system="S")


def test_parquet_rows_are_read_like_jsonl(tmp_path, tokenizer):
    """Parquet rows are read like JSONL rows, and a broken file is an error."""
    import pyarrow
    import pyarrow.parquet

    path = str(tmp_path / "data.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b", "c"], "references": [["x"], None, []]}), path)
    loaded = load(path, tokenizer, num_rows=2)
    assert [p.text for p in loaded.prompts] == ["a", "b"] and loaded.prompts[0].references == ("x",)
    Path(path).write_text("not parquet")
    with pytest.raises(ConfigError, match="cannot be read as parquet"):
        load(path, tokenizer)


def test_an_unreachable_hub_is_an_error(tokenizer, monkeypatch):
    """A hub data set that cannot be downloaded is an error with the reason in one line."""
    monkeypatch.setattr(hub, "unreachable", lambda: "")
    monkeypatch.setattr(dataset, "unreachable", lambda: "")
    import datasets

    def refuse(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ConfigError, match=r"'someone/some' \(split 'train'\) .* no route$"):
        load("someone/some", tokenizer)


class TestStream:
    """The order of prompts is a function of seed and index."""

    def test_epochs_are_permutations(self):
        """Each epoch has each prompt once in a new order, whatever the order of access."""
        stream = PromptStream(list("abcdefghij"), seed=3)
        seen = [stream[i] for i in range(30)]
        epochs = [[prompt for epoch, prompt in seen if epoch == e] for e in range(3)]
        assert [sorted(order) for order in epochs] == [list("abcdefghij")] * 3
        assert epochs[0] != epochs[1] != epochs[2]
        fresh = PromptStream(list("abcdefghij"), seed=3)
        assert [fresh[i] for i in reversed(range(30))] == seen[::-1]
        assert [PromptStream(list("abcdefghij"), seed=4)[i][1] for i in range(10)] != epochs[0]

    def test_any_index_is_cheap(self):
        """A far index costs as much as the first; `shuffle: false` keeps the file's order; a seed may be negative."""
        assert PromptStream("abc", seed=-1)[3 * 10**12 + 1][0] == 10**12
        assert [PromptStream("abc", seed=0, shuffle=False)[i] for i in (0, 4)] == [(0, "a"), (1, "b")]

    def test_order_is_pinned(self):
        """The order is pinned: a NumPy version may not change what a resumed run trains on."""
        assert "".join(PromptStream("abcdefgh", seed=1)[i][1] for i in range(16)) == "decbaghfbfdcegah"


# --- an input beside the prompt, lists of references, files of the hub -----------------------------------------------

WITH_INPUT = {"prompt_field": "instruction", "input_field": "context", "reference_field": "output"}


def test_input_field_joins_the_prompt(tmp_path, tokenizer):
    """`input_field` follows the prompt after a blank line, or stands where `template_with_input` puts it; braces in
    texts stay, and double ones of a template are single."""
    rows = [{"instruction": "sum {input}", "context": "of {prompt}", "output": "a"},
            {"instruction": "say", "context": " ", "output": "b"}, {"instruction": "go", "output": "c"}]  # fmt: skip
    path = jsonl(tmp_path, *rows)
    prompts = load(path, tokenizer, **WITH_INPUT).prompts
    assert [one.text for one in prompts] == ["sum {input}\n\nof {prompt}", "say", "go"]
    templates = {"template": "Q {prompt} A{{1}}", "template_with_input": "Q {prompt} I {input} A"}
    prompts = load(path, tokenizer, **WITH_INPUT, **templates).prompts
    read = [tokenizer.decode(one.token_ids) for one in prompts]
    assert read == ["Q sum {input} I of {prompt} A", "Q say A{1}", "Q go A{1}"]
    for missing in ("template", "input_field"):
        wrong = {**WITH_INPUT, **templates, missing: None}
        with pytest.raises(ConfigError, match=r"belongs to data.template and data.input_field"):
            load(path, tokenizer, **wrong)
    with pytest.raises(ValidationError, match=r"does not contain \{input\}"):
        load(path, tokenizer, **WITH_INPUT, template="{prompt}", template_with_input="{prompt}")


def test_the_first_of_a_list_of_references_is_trained_on(tmp_path, tokenizer):
    """In a list of references the first is trained on and all count for metrics."""
    (prompt,) = load(jsonl(tmp_path, {"prompt": "x", "reference": ["b", "a"]}), tokenizer, need_references=True).prompts
    assert (prompt.reference, prompt.references) == ("b", ("b", "a"))
    with pytest.raises(ConfigError, match="is a list, not a list of texts"):
        load(jsonl(tmp_path, {"prompt": "x", "reference": [1]}), tokenizer)


def test_split_selects_rows_of_a_file(tmp_path, tokenizer):
    """`split` selects rows of a file before `num_rows`; row names keep the file's line numbers."""
    path = jsonl(tmp_path, *({"prompt": f"q{i}"} for i in range(6)))
    for split, wanted in {"train[2:]": "2345", "train[:2]": "01", "[1:3]": "12", "train": "012345"}.items():
        assert [one.text for one in load(path, tokenizer, split=split).prompts] == [f"q{i}" for i in wanted]
    assert [one.text for one in load(path, tokenizer, split="train[3:]", num_rows=2).prompts] == ["q3", "q4"]
    assert load(path, tokenizer, split="train[3:]").prompts[0].prompt_id == f"{path}:4"
    with pytest.raises(ConfigError, match=r"split 'train\[:10%\]' of a file is not understood"):
        load(path, tokenizer, split="train[:10%]")


def test_a_file_is_downloaded_from_the_hub(tmp_path, tokenizer, monkeypatch):
    """`hf://datasets/owner/name/file` is downloaded with huggingface_hub; its error becomes one line."""
    monkeypatch.setattr(dataset, "unreachable", lambda: "")
    import huggingface_hub

    asked = []

    def fetch(repo, file, *, repo_type, token):
        asked.append((repo, file, repo_type))
        if repo == "no/one":
            raise OSError("no route\nto host")
        return jsonl(tmp_path, {"prompt": "q"}, name="fetched.jsonl")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    (prompt,) = load("hf://datasets/owner/name/sub/f.jsonl", tokenizer).prompts
    assert prompt.prompt_id == "hf://datasets/owner/name/sub/f.jsonl:1"
    with pytest.raises(
        ConfigError, match=r"^data 'hf://datasets/no/one/f.jsonl' cannot be had from the hub: no route;"
    ):
        load("hf://datasets/no/one/f.jsonl", tokenizer)
    assert asked == [("owner/name", "sub/f.jsonl", "dataset"), ("no/one", "f.jsonl", "dataset")]
    with pytest.raises(ConfigError, match=r"is not of the form hf://datasets/owner/name/file.jsonl"):
        load("hf://owner/f.jsonl", tokenizer)


class TestLayerTexts:
    """The texts on which a pruned student's layers are chosen."""

    @pytest.fixture(scope="class")
    def model(self, tmp_path_factory) -> ModelConfig:
        return ModelConfig(path=str(save_tiny(tmp_path_factory.mktemp("models") / "teacher")))

    def test_they_are_the_first_tokens_of_the_data(self, tmp_path, tokenizer, model):
        """They are the first rows that are not empty, prompt and reference, each cut at a quarter of all tokens and the
        last at what is left; the limits of training data do not matter."""
        rows = [{"prompt": ""}, {"prompt": "a b", "reference": "c"}, {"prompt": "d"}]
        rows += [{"prompt": f"{i} " * 400, "reference": "e"} for i in range(9)]
        data = DataConfig(path=jsonl(tmp_path, *rows), max_prompt_tokens=1)
        texts = layer_texts(data, model)
        assert [tokenizer.decode(text) for text in texts[:2]] == ["<user>a b<assistant>c<eos>", "<user>d<assistant>"]
        quarter = LAYER_TOKENS // 4
        assert [len(text) for text in texts[2:]] == [quarter] * 3 + [quarter - len(texts[0]) - len(texts[1])]
        assert layer_texts(data.model_copy(update={"num_rows": 2}), model) == texts[:1]

    def test_without_data_they_are_rows_of_the_package(self, tokenizer, model):
        """Without a data path they are rows of the package, with references, whatever the fields of the data."""
        texts = layer_texts(DataConfig(prompt_field="question", messages_field="chat"), model)
        assert len(texts) >= 4 and sum(map(len, texts)) == LAYER_TOKENS
        assert all("<assistant>" in tokenizer.decode(text) for text in texts)
