"""What is learned of a conversation: every answer with the token that ends it, and nothing else."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from hfllm.data import formats
from hfllm.data.conversations import DIFFERENT, FIRST, REWRITES, UNSEEN, Conversations, read_back
from hfllm.data.formats import OriginRow
from hfllm.data.packing import IGNORE
from hfllm.data.tokenizer import BUILT_IN, CALL_MARKS, plain_chat_template, train_tokenizer
from hfllm.data.world.demonstrators import instruction_rows
from hfllm.errors import InputError

DEFAULT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
# SmolLM2's.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + DEFAULT + "<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As in Qwen3's, an answer that is not the last loses its thoughts.
FORGETS = CHATML.replace(
    "message['content'] + '<|im_end|>'",
    "(message['content'] if loop.last else message['content'].split('</think>')[-1]) + '<|im_end|>'",
)
# As in Hermes' and Qwen2.5's.
TOOLS = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content }}"
    "{%- for call in message.tool_calls or [] %}"
    "{{- '<tool_call>' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
WORDS = (
    "red",
    "Who are you?",
    "I am a small model.",
    "Have a nice day!",
    "You too!",
    "1, 2 and 3\n\nor 4?",
    "  spaces  ",
)


@pytest.fixture(scope="module")
def chatml(world):
    rows = instruction_rows(world, 300)
    texts = [f"{row['instruction']} {row['input']} {row['output']}" for row in rows]
    special = ["<|im_start|>", "<|im_end|>"]
    tokenizer = train_tokenizer(texts, vocab_size=400, model_max_length=2048, extra_special_tokens=special)
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", CHATML
    return tokenizer


def sharegpt(*said):
    """A row in the shape of FastChat's dummy conversations."""
    turns = [{"from": "human" if at % 2 == 0 else "gpt", "value": text} for at, text in enumerate(said)]
    return {"id": "identity_0", "conversations": turns}


ROWS = [sharegpt(*WORDS[at : at + 2], *WORDS[: 2 * more]) for at in range(5) for more in range(4)]


def labeled(tokenizer, *rows, convert=formats.to_sft, **options):
    """The labeled conversations of each row, and the notes."""
    conversations = Conversations(tokenizer, **options)
    rows = [OriginRow(convert("here", row), f"file, line {number}") for number, row in enumerate(rows, 1)]
    return list(conversations.label(rows)), dict(conversations.notes.reasons)


def parts(tokenizer, one):
    """The text of a conversation in parts, learned or not, one after the other."""
    found = []
    for token, label in zip(one.input_ids, one.labels, strict=True):
        assert label in (token, IGNORE)
        if not found or found[-1][0] != (label != IGNORE):
            found.append((label != IGNORE, []))
        found[-1][1].append(token)
    return [(learned, tokenizer.decode(ids)) for learned, ids in found]


def written(tokenizer, row):
    """The same by hand."""
    if "<|im_end|>" in tokenizer.get_vocab():
        ours, ends, shown = "<|im_start|>{}\n", "<|im_end|>\n", [(False, f"<|im_start|>system\n{DEFAULT}<|im_end|>\n")]
    else:
        ours, ends, shown = "<|{}|>", "<|end|>", []
    for turn in row["conversations"]:
        role = {"human": "user", "gpt": "assistant"}[turn["from"]]
        shown += [(False, ours.format(role)), (role == "assistant", turn["value"] + ends)]
    together = []
    for learned, text in shown:
        if together and together[-1][0] == learned:
            together[-1] = (learned, together[-1][1] + text)
        else:
            together.append((learned, text))
    return together


@pytest.mark.parametrize("template", ["the world's", "SmolLM2's"])
def test_every_answer_is_learned_and_nothing_else(template, tokenizer, chatml, capsys):
    tokenizer = chatml if template == "SmolLM2's" else tokenizer
    found, notes = labeled(tokenizer, *ROWS)
    assert not notes
    for row, (one,) in zip(ROWS, found, strict=True):
        shown = parts(tokenizer, one)
        print(template, [text for learned, text in shown if learned])
        assert shown == written(tokenizer, row)
    assert "'You too!<|" in capsys.readouterr().out


FASTCHAT = Path(__file__).parents[3] / "shared/data/instruct/fastchat_dummy_conversation.json"


@pytest.mark.slow
@pytest.mark.skipif(not FASTCHAT.is_file(), reason="needs FastChat's dummy conversations")
def test_every_answer_of_fastchats_dummy_conversations(tokenizer, chatml):
    rows = json.loads(FASTCHAT.read_text())
    for each in (tokenizer, chatml):
        found = [parts(each, one) for (one,) in labeled(each, *rows)[0]]
        assert found == [written(each, row) for row in rows]
        assert sum(learned for shown in found for learned, _ in shown) == 1000


@pytest.mark.slow
def test_single_answers_have_the_tokens_and_labels_of_trl(tokenizer, chatml, world):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [formats.to_sft("world", row) for row in instruction_rows(world, 60)]
    for each in (tokenizer, chatml):
        for template in (each.chat_template, plain_chat_template()):
            each.chat_template, before = template, each.chat_template
            config = SFTConfig(output_dir="unused", use_cpu=True, bf16=False, max_length=None, report_to="none")
            trainer = SimpleNamespace(_tokenizer=each, chat_template=None, completion_only_loss=True)
            prepare = SFTTrainer._prepare_dataset
            expected = prepare(trainer, Dataset.from_list(rows), each, config, False, None, "train")
            found = [one for (one,) in Conversations(each).label(rows)]
            assert [one.input_ids for one in found] == expected["input_ids"][:]
            assert [one.labels for one in found] == expected["labels"][:]
            each.chat_template = before


def test_the_last_answer_alone(chatml):
    row = sharegpt("Q", "A", "P", "B")
    ((one,),), _ = labeled(chatml, row, convert=lambda origin, row: formats.last_turn(formats.to_sft(origin, row)))
    assert [text for learned, text in parts(chatml, one) if learned] == ["B<|im_end|>\n"]


def test_a_template_that_forgets_gives_a_row_for_each_answer(chatml, monkeypatch):
    monkeypatch.setattr(chatml, "chat_template", FORGETS)
    row = sharegpt("Q", "<think>a</think>A", "P", "<think>b</think>B")
    (split, (single,)), notes = labeled(chatml, row, sharegpt("Q", "<think>a</think>A"))
    assert notes == {REWRITES: 1}
    learned = [[text for learned, text in parts(chatml, one) if learned] for one in (*split, single)]
    assert learned == [[f"<think>{x}</think>{x.upper()}<|im_end|>\n"] for x in "aba"]
    before = "".join(text for learned, text in parts(chatml, split[1]) if not learned)
    assert "assistant\nA<|im_end|>" in before and "<think>" not in before


def test_marks_that_leave_out_the_end_of_a_turn_are_not_enough(tokenizer, monkeypatch):
    template = tokenizer.chat_template.replace(
        "{{- '<|end|>' -}}{% endgeneration %}", "{% endgeneration %}{{- '<|end|>' -}}"
    )
    assert template != tokenizer.chat_template
    monkeypatch.setattr(tokenizer, "chat_template", template)
    row = sharegpt("Q", "A", "P", "B")
    ((one,),), _ = labeled(tokenizer, row)
    assert parts(tokenizer, one) == written(tokenizer, row)
    # Unless the user asks for what is marked.
    ((one,),), _ = labeled(tokenizer, row, marked_template=template)
    assert [text for learned, text in parts(tokenizer, one) if learned] == ["A", "B"]


def test_a_greeting_and_a_prompt_that_ends_otherwise_are_noted(chatml, monkeypatch):
    row = {"conversations": [{"from": "gpt", "value": "Hello!"}, *sharegpt("Q", "A")["conversations"]]}
    ((one,),), notes = labeled(chatml, row)
    assert notes == {FIRST: 1}
    assert [text for learned, text in parts(chatml, one) if learned] == ["A<|im_end|>\n"]
    thinks = CHATML.replace("'<|im_start|>assistant\n' }}", "'<|im_start|>assistant\n<think>' }}")
    monkeypatch.setattr(chatml, "chat_template", thinks)
    ((one,),), notes = labeled(chatml, sharegpt("Q", "A"))
    assert notes == {DIFFERENT: 1}
    assert [text for learned, text in parts(chatml, one) if learned] == ["A<|im_end|>\n"]


def test_a_student_learns_what_a_fine_tuned_model_does(chatml):
    from hfllm.trainers.distillation.data import tokenize_dataset

    rows = [formats.to_sft("here", row) for row in ROWS]
    # Among rows of other kinds, in their order.
    mixed = [{"text": "red"}, *rows[:3], {"prompt": "Q", "completion": "A"}, *rows[3:]]
    found = tokenize_dataset(mixed, chatml, None).to_list()
    del found[4], found[0]
    assert found == [vars(one) for (one,) in Conversations(chatml).label(rows)]


def test_a_teacher_answers_the_last_turn(monkeypatch):
    from hfllm.stages import distill

    asked = []
    monkeypatch.setattr(
        "hfllm.synthesis.answers.write_answers", lambda model, tokenizer, rows, *settings: asked.extend(rows)
    )
    row = formats.to_sft("here", sharegpt("Q", "A", "P", "B"))
    distill.rows_to_teach((None, None), [row, {"text": "red"}], "sampled", 0.0, 256, 0)
    assert [message["content"] for message in asked[0]["prompt"]] == ["Q", "A", "P"] and asked[1] == {"text": "red"}


CALLS = {
    "conversations": [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
        {"from": "observation", "value": '{"sun": "yes"}'},
        {"from": "gpt", "value": "It is sunny."},
    ],
    "tools": '[{"name": "weather", "description": "Tells the weather", "parameters": {"type": "object"}}]',
}
OPENAI = {
    "messages": [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Rome"}'}}],
        },
        {"role": "tool", "content": '{"sun": "yes"}'},
        {"role": "assistant", "content": "It is sunny.", "tool_calls": None},
    ],
    "tools": [
        {
            "type": "function",
            "function": {"name": "weather", "description": "Tells the weather", "parameters": {"type": "object"}},
        }
    ],
}


def test_calls_of_tools_are_learned_and_what_tools_return_is_not(chatml, monkeypatch):
    assert formats.to_sft("here", CALLS) == formats.to_sft("here", OPENAI)
    monkeypatch.setattr(chatml, "chat_template", TOOLS)
    ((one,),), notes = labeled(chatml, CALLS)
    assert not notes
    shown = parts(chatml, one)
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}<|im_end|>\n'
    assert [text for learned, text in shown if learned] == [call, "It is sunny.<|im_end|>\n"]
    assert json.dumps(OPENAI["tools"][0]) in shown[0][1]
    assert '<|im_start|>tool\n{"sun": "yes"}<|im_end|>' in shown[2][1]


def said(content, **more):
    return {"role": "assistant", "content": content, **more}


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("marked", [False, True])
def test_our_templates_write_calls_to_be_learned(tokenizer, chatml, monkeypatch, name, marked):
    each = chatml if name == "chatml" else tokenizer
    monkeypatch.setattr(each, "chat_template", BUILT_IN[name].chat_template())
    monkeypatch.setattr(each, "response_template", BUILT_IN[name].response_template())
    rows = [OriginRow(formats.to_sft("here", row), "here") for row in (CALLS, OPENAI)]
    found, notes = labeled(each, CALLS, OPENAI, marked_template=each.chat_template if marked else None)
    assert found[0] == found[1] and not notes
    learned = [text for is_learned, text in parts(each, found[0][0]) if is_learned]
    end = each.eos_token
    call = "".join(CALL_MARKS).replace("><", '>{"name": "weather", "arguments": {"city": "Rome"}}<')
    assert [text.replace("\n", "") for text in learned] == [f"{call}{end}", f"It is sunny.{end}"]
    assert str(read_back(rows, each)) == "2 of 2 calls of tools are read back exactly"


TOOLS_OF_TWO = [
    {"type": "function", "function": {"name": name, "description": "d", "parameters": {"properties": {key: {"x": 1}}}}}
    for name, key in (("weather", "city"), ("add", "terms"))
]


def test_what_datasets_fills_in_is_not_written(chatml, monkeypatch):
    """Rows with different tools: Arrow gives each all fields of the others."""
    from datasets import Dataset

    monkeypatch.setattr(chatml, "chat_template", BUILT_IN["chatml"].chat_template())
    monkeypatch.setattr(chatml, "response_template", BUILT_IN["chatml"].response_template())
    calls = [("weather", {"city": {"name": "Rome"}}), ("add", {"terms": [1, 2], "modulo": 7})]
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Go"},
                said("", tool_calls=[{"type": "function", "function": {"name": name, "arguments": arguments}}]),
                {"role": "tool", "content": "ok"},
                said("Done.", reasoning_content="hm") if name == "add" else said("Done."),
            ],
            "tools": [tool],
        }
        for (name, arguments), tool in zip(calls, TOOLS_OF_TWO, strict=True)
    ]
    filled = Dataset.from_list(rows).to_list()
    assert filled[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]["terms"] is None
    assert filled[0]["tools"][0]["function"]["parameters"]["properties"]["terms"] is None
    assert [formats.to_sft("here", row) for row in filled] == [formats.to_sft("here", row) for row in rows]
    found, _ = labeled(chatml, *filled)
    assert found == labeled(chatml, *rows)[0] and "null" not in chatml.decode(found[0][0].input_ids)
    assert read_back([formats.to_sft("here", row) for row in filled], chatml).exact_calls == 2


def test_null_is_kept_in_json_text():
    message = said(None, tool_calls=[{"function": {"name": "f", "arguments": '{"limit": null}'}}])
    row = formats.to_sft("here", {"messages": [{"role": "user", "content": "Q"}, message], "tools": " "})
    assert row["completion"][0]["tool_calls"][0]["function"]["arguments"] == {"limit": None} and "tools" not in row


THINKS = {
    "messages": [
        {"role": "user", "content": "Q"},
        said("A", reasoning_content="look"),
        {"role": "user", "content": "P"},
        said("B", thinking="again"),
    ]
}


@pytest.mark.parametrize("marked", [False, True])
def test_each_answer_is_learned_with_its_thoughts(tokenizer, marked):
    """Those of earlier answers are not shown, so a conversation becomes a row for each answer."""
    (split,), notes = labeled(tokenizer, THINKS, marked_template=tokenizer.chat_template if marked else None)
    assert notes == {REWRITES: 1}
    assert [parts(tokenizer, one) for one in split] == [
        [(False, "<|user|>Q<|end|><|assistant|>"), (True, "<think>look</think>A<|end|>")],
        [
            (False, "<|user|>Q<|end|><|assistant|>A<|end|><|user|>P<|end|><|assistant|>"),
            (True, "<think>again</think>B<|end|>"),
        ],
    ]
    rows = [formats.to_sft("here", THINKS)]
    assert str(read_back(rows, tokenizer)) == "2 of 2 thoughts are read back exactly"


@pytest.mark.parametrize("marked", [False, True])
def test_thoughts_between_calls_are_learned_in_one_row(tokenizer, marked):
    messages = [THINKS["messages"][0], {**OPENAI["messages"][1], "reasoning_content": "look"}]
    row = {"messages": [*messages, {"role": "tool", "content": "sun"}, said("A", reasoning_content="so")]}
    ((one,),), notes = labeled(tokenizer, row, marked_template=tokenizer.chat_template if marked else None)
    learned = [text for is_learned, text in parts(tokenizer, one) if is_learned]
    assert [text.partition("</think>")[0] for text in learned] == ["<think>look", "<think>so"] and not notes


def test_what_is_not_read_back_is_counted(chatml, monkeypatch):
    monkeypatch.setattr(chatml, "chat_template", TOOLS)
    rows = [OriginRow(formats.to_sft("here", CALLS), "file, row 7")]
    assert read_back(rows, chatml) is None or read_back(rows, chatml).exact_calls == 0
    monkeypatch.setattr(chatml, "response_template", BUILT_IN["chatml"].response_template())
    assert str(read_back(rows, chatml)) == (
        "0 of 1 calls of tools are read back exactly (first that are not: file, row 7)"
    )
    assert read_back([formats.to_sft("here", sharegpt("Q", "A"))], chatml) is None


def test_what_a_template_leaves_out_is_named(tokenizer, chatml, monkeypatch):
    with pytest.raises(
        InputError, match=r"^file, line 2: the chat template leaves out calls.*\('weather'\).* chatml$"
    ):
        labeled(chatml, sharegpt("Q", "A"), CALLS)
    thinks = {"messages": [sharegpt("Q")["conversations"][0], {**said("A"), "thinking": "hm"}]}
    with pytest.raises(InputError, match=r"^file, line 1: the chat template leaves out reasoning_content.* chatml$"):
        labeled(chatml, thinks)
    monkeypatch.setattr(
        chatml,
        "chat_template",
        TOOLS.replace("message.content", "(message.content if message.role != 'tool' else '')"),
    )
    with pytest.raises(InputError, match="leaves out messages of the role tool"):
        labeled(chatml, CALLS)
    monkeypatch.setattr(chatml, "chat_template", TOOLS.replace("if tools", "if false"))
    assert labeled(chatml, CALLS)[1] == {UNSEEN: 1}


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        ({"from": "function_call", "value": "weather Rome"}, "a call of a tool needs a name and arguments"),
        ({"from": "robot", "value": "beep"}, "a message needs role"),
    ],
)
def test_a_call_that_is_none_is_named(broken, complaint):
    row = {"conversations": [{"from": "human", "value": "Q"}, broken, {"from": "gpt", "value": "A"}]}
    with pytest.raises(InputError, match=rf"x\.json, row 3: {complaint}"):
        formats.to_sft("x.json, row 3", row)
    with pytest.raises(InputError, match=r"x\.json, row 3: tools must be a list"):
        formats.to_sft("x.json, row 3", {**CALLS, "tools": "none"})


@pytest.mark.parametrize("fault", ["{{ 1 / 0 }}", "{% for i in range(10**9) %}{% endfor %}", "{{ messages[9].role }}"])
def test_a_chat_template_that_ends_in_any_error_is_named(tokenizer, monkeypatch, fault):
    only_long = f"{{% if messages|length > 2 %}}{fault}{{% endif %}}"
    monkeypatch.setattr(tokenizer, "chat_template", f"{only_long}{tokenizer.chat_template}")
    said = [{"role": role, "content": "Go"} for role in ("user", "assistant") * 2]
    with pytest.raises(InputError, match="file, line 1: the chat template cannot write this conversation"):
        labeled(tokenizer, {"messages": said})
