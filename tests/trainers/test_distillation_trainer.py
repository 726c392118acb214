"""However a batch is cut, padded, cached or interrupted, the student learns the same."""

import pytest
import torch
from datasets import Dataset
from families import FAMILIES
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from hfllm.compression.schemes import get_scheme
from hfllm.errors import InputError
from hfllm.trainers.distillation import data as distillation_data
from hfllm.trainers.distillation import students
from hfllm.trainers.distillation import trainer as distilling
from hfllm.trainers.distillation.config import DistillationConfig
from hfllm.trainers.distillation.data import DistillationCollator, tokenize_dataset
from hfllm.trainers.distillation.students import layer_pairs, load_teacher, smaller_student, student_from_layers
from hfllm.trainers.distillation.trainer import DistillationTrainer

ROWS = [
    {"prompt": "Say red.", "completion": " Red it is, and blue."},
    {"text": "The fox is green and lives in a tree."},
    {"prompt": [{"role": "user", "content": "Go"}], "completion": [{"role": "assistant", "content": "Where to?"}]},
    {"text": "Go on."},
    {"prompt": "What is 1 plus 2?", "completion": " 3"},
    {"text": "Two owls sat on a wall in the rain and the third one flew away to the sea."},
] * 2


@pytest.fixture
def make_trainer(make_model, tokenizer, tmp_path):
    def make(folder="run", rows=ROWS, model=None, teacher=None, **more):
        settings = {
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "per_device_train_batch_size": 4,
            "learning_rate": 3e-3,
            "num_train_epochs": 1,
            "logging_steps": 1,
            "save_strategy": "no",
            "loss_chunk_size": 5,
        }
        names = {"eval_dataset", "peft_config", "teacher_processing_class", "callbacks"}
        given = {name: more.pop(name) for name in names & more.keys()}
        return DistillationTrainer(
            model=model or make_model(),
            teacher_model=teacher or make_model(seed=1, hidden_size=48, num_hidden_layers=3),
            args=DistillationConfig(str(tmp_path / folder), **{**settings, **more}),
            train_dataset=rows,
            processing_class=tokenizer,
            **given,
        )

    return make


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def trained(make_trainer, *args, **kwargs):
    trainer = make_trainer(*args, **kwargs)
    trainer.train()
    return trainer


@pytest.mark.slow
def test_the_first_loss_is_the_definition(make_trainer, make_model, tokenizer):
    trainer = trained(make_trainer, per_device_train_batch_size=12, max_steps=1)
    student, teacher = make_model(), make_model(seed=1, hidden_size=48, num_hidden_layers=3)
    soft, hard, count = 0.0, 0.0, 0
    for row in tokenize_dataset(ROWS, tokenizer, None):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            q, p = (model(ids, use_cache=False).logits[0, :-1] for model in (student, teacher))
        for place, label in enumerate(row["labels"][1:]):
            if label != -100:
                soft_p, soft_q = (p[place] / 3).log_softmax(-1), (q[place] / 3).log_softmax(-1)
                soft += torch.nn.functional.kl_div(soft_q, soft_p, reduction="sum", log_target=True).item()
                hard -= q[place].log_softmax(-1)[label].item()
                count += 1
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx((0.7 * 9 * soft + 0.3 * hard) / count, rel=1e-4)
    assert (entry["soft_loss"], entry["hard_loss"]) == pytest.approx((soft / count, hard / count), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"hidden_weight": 0.5}, {"beta": 0.5, "teacher_top_k": 7}], ids=str)
def test_accumulation_is_one_batch(make_trainer, more):
    # Plain steps: Adam would blow rounding up where a gradient is nearly zero.
    results, settings = [], {"optim": "sgd", "learning_rate": 0.1, "max_steps": 2, "max_grad_norm": 0.0, **more}
    for size in (12, 4, 1):
        torch.manual_seed(0)
        trainer = make_trainer(
            f"size{size}", per_device_train_batch_size=size, gradient_accumulation_steps=12 // size, **settings
        )
        trainer.train()
        results.append((weights(trainer), [entry.get("loss", 0) for entry in trainer.state.log_history]))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=2e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [0, 1, 1000])
def test_chunks_are_the_whole(make_trainer, chunk):
    expected = weights(trained(make_trainer, optim="sgd", learning_rate=0.1))
    actual = weights(trained(make_trainer, loss_chunk_size=chunk, optim="sgd", learning_rate=0.1))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_padding_changes_nothing(make_trainer, tokenizer):
    trainer = make_trainer(beta=0.5, hidden_weight=0.3)
    rows = list(trainer.train_dataset)[:4]
    losses = []
    for multiple in (1, 64):
        trainer.model.zero_grad()
        trainer.model.train()
        batch = DistillationCollator(tokenizer.pad_token_id, multiple)(rows)
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        losses.append((loss.detach(), [p.grad.clone() for p in trainer.model.parameters()]))
    assert batch["input_ids"].shape[1] == 64
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_cache_of_everything_is_the_teacher(make_trainer, tokenizer):
    settings = {"optim": "sgd", "learning_rate": 0.1, "eval_dataset": ROWS[:5], "beta": 0.5}
    live = trained(make_trainer, "live", **settings)
    cached = trained(make_trainer, "cached", teacher_top_k=len(tokenizer), **settings)
    assert cached.teacher is None
    torch.testing.assert_close(weights(cached), weights(live), atol=1e-5, rtol=1e-4)
    assert cached.evaluate()["eval_loss"] == pytest.approx(live.evaluate()["eval_loss"], rel=1e-4)
    few = trained(make_trainer, "few", teacher_top_k=4, **settings)
    assert few.state.log_history[0]["soft_loss"] < live.state.log_history[0]["soft_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("k", [None, 7])
def test_rows_to_evaluate_on_have_names_or_come_later(make_trainer, k):
    trainer = make_trainer(eval_dataset={"a/b": ROWS[:3], "other": ROWS[3:6]}, teacher_top_k=k)
    metrics = trainer.evaluate()
    alone = [
        make_trainer(f"run{start}", eval_dataset=ROWS[start : start + 3], teacher_top_k=k).evaluate()["eval_loss"]
        for start in (0, 3)
    ]
    assert [metrics["eval_a/b_loss"], metrics["eval_other_loss"]] == pytest.approx(alone, rel=1e-5)
    assert trainer.evaluate("other")["eval_loss"] == pytest.approx(alone[1], rel=1e-5)
    assert trainer.evaluate(trainer.eval_dataset["other"])["eval_loss"] == pytest.approx(alone[1], rel=1e-5)
    with pytest.raises(InputError, match="eval_dataset 'third': expected one of a/b, other"):
        trainer.evaluate("third")
    if k is None:
        assert trainer.evaluate(ROWS[3:6])["eval_loss"] == pytest.approx(alone[1], rel=1e-5)
        assert trainer.evaluate({"x": ROWS[3:6]})["eval_x_loss"] == pytest.approx(alone[1], rel=1e-5)
        assert trainer.predict(ROWS[3:6]).metrics["test_loss"] == pytest.approx(alone[1], rel=1e-5)
    else:
        with pytest.raises(InputError, match=r"with teacher_top_k=7 its teacher ran then"):
            trainer.evaluate(ROWS[3:6])


@pytest.mark.slow
def test_the_teacher_is_asked_once_and_a_stale_cache_is_noticed(make_trainer, make_model, tmp_path, capsys):
    asked = []

    class Teacher(type(make_model())):
        def get_output_embeddings(self):
            asked.append(1)
            return super().get_output_embeddings()

    def teacher(seed=1):
        return make_model(seed=seed, model_class=Teacher)

    def calls(**more):
        asked.clear()
        make_trainer(teacher_top_k=3, **more)
        return bool(asked)

    assert calls(teacher=teacher())
    assert not calls(teacher=teacher())
    assert not calls(teacher=teacher(), beta=1.0)  # what is kept does not depend on the divergence
    assert "asked again" not in capsys.readouterr().out
    assert calls(teacher=teacher(seed=2))
    assert "the teacher is asked again: what was stored is of other rows or flags" in capsys.readouterr().out
    assert calls(teacher=teacher(seed=2), temperature=2.0)
    assert calls(teacher=teacher(seed=2), temperature=2.0, rows=ROWS[:7])
    shared = str(tmp_path / "shared")
    assert calls(teacher=teacher(), teacher_cache_dir=shared, folder="one")
    assert not calls(teacher=teacher(), teacher_cache_dir=shared, folder="other")
    unfinished = list((tmp_path / "shared").rglob("teacher.arrow"))
    assert len(unfinished) == 1
    unfinished[0].unlink()
    assert calls(teacher=teacher(), teacher_cache_dir=shared, folder="other")
    # A folder that the user names may hold other things, and the caches of other runs.
    (tmp_path / "shared" / "train" / "photos").mkdir()
    assert calls(teacher=teacher(), teacher_cache_dir=shared, temperature=2.0)
    assert not calls(teacher=teacher(), teacher_cache_dir=shared)
    assert f"{shared}/train: the teacher" not in capsys.readouterr().out
    assert (tmp_path / "shared" / "train" / "photos").is_dir()


@pytest.mark.slow
def test_a_named_teacher_is_not_even_loaded_from_a_cache(make_trainer, saved, monkeypatch):
    make_trainer(teacher=str(saved), teacher_top_k=3)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    trained(make_trainer, teacher=str(saved), teacher_top_k=3)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"hidden_weight": 0.5}, {"teacher_top_k": 5}], ids=str)
def test_it_goes_on_as_if_it_had_not_stopped(make_trainer, tmp_path, more):
    settings = {"per_device_train_batch_size": 3, "num_train_epochs": 2, **more}
    torch.manual_seed(0)
    whole = trained(make_trainer, "whole", **settings)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    torch.manual_seed(0)
    saving = {"save_strategy": "steps", "save_steps": 3, **settings}
    trained(make_trainer, "half", callbacks=[Stop()], **saving)
    torch.manual_seed(99)
    again = make_trainer("half", **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-3"))
    assert again.state.global_step == whole.state.global_step == 8
    torch.testing.assert_close(weights(again), weights(whole), rtol=0, atol=0)


def test_projections_are_learned_and_not_saved(make_trainer, tmp_path):
    trainer = make_trainer(hidden_weight=1.0, save_strategy="steps", save_steps=2)
    before = [value.clone() for value in trainer._projection.parameters()]
    trainer.train()
    assert [value.shape for value in before] == [(48, 32)] * 2
    assert all(not torch.equal(*pair) for pair in zip(before, trainer._projection.parameters(), strict=True))
    trainer.save_model()
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert not list((tmp_path / "run").glob("distillation_projection*"))
    assert (tmp_path / "run" / "checkpoint-2" / "distillation_projection.safetensors").is_file()
    distances = [entry["hidden_loss"] for entry in trainer.state.log_history if "hidden_loss" in entry]
    assert len(distances) == 3


def test_layers_meet_evenly():
    assert layer_pairs(2, 6) == [(1, 3), (2, 6)]
    assert layer_pairs(3, 3) == [(1, 1), (2, 2), (3, 3)]
    assert layer_pairs(4, 2)[-1] == (4, 2)


def test_a_student_of_the_same_width_has_no_projection(make_trainer, make_model):
    teacher = make_model(seed=1, num_hidden_layers=4)
    trainer = make_trainer(model=student_from_layers(teacher, 2), teacher=teacher, hidden_weight=1.0)
    assert not list(trainer._projection.parameters())
    trainer.train()


@pytest.mark.parametrize("every", [2, 3])
def test_a_students_layers_are_the_teachers(make_model, every):
    teacher = make_model(num_hidden_layers=5)
    student = student_from_layers(teacher, every)
    kept = list(range(0, 5, every))
    assert student.config.num_hidden_layers == len(kept)
    for new, old in enumerate(kept):
        ours, theirs = student.model.layers[new].state_dict(), teacher.model.layers[old].state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight)
    ids = torch.tensor([[5, 6, 7]])
    teacher.model.layers = torch.nn.ModuleList(teacher.model.layers[layer] for layer in kept)
    teacher.config.num_hidden_layers = len(kept)
    torch.testing.assert_close(student(ids, use_cache=False).logits, teacher(ids, use_cache=False).logits)


def test_a_student_in_bfloat16_turns_positions_as_its_teacher_does(make_model, tmp_path):
    make_model(num_hidden_layers=2).save_pretrained(tmp_path)
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    student = student_from_layers(teacher, 2)
    assert student.dtype == torch.bfloat16
    for (name, own), given in zip(student.named_buffers(), teacher.buffers(), strict=True):
        assert own.dtype == given.dtype and torch.equal(own, given), name


def test_a_smaller_student_keeps_the_teachers_proportions(make_model):
    teacher = make_model(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=192)
    student = smaller_student(teacher, hidden_size=32, num_hidden_layers=1, initializer_range=0.3)
    config = student.config
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (32, 1, 96)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 8)
    assert config.vocab_size == teacher.config.vocab_size
    assert student.num_parameters() == config.num_parameters() < teacher.num_parameters()
    assert student.lm_head.weight.std().item() == pytest.approx(0.3, rel=0.1)
    with pytest.raises(InputError, match="width 30 with 4 attention heads"):
        smaller_student(teacher, hidden_size=30)


def test_a_student_keeps_the_experts_of_its_layers(make_model):
    teacher = make_model(**{**FAMILIES["glm4-moe"], "num_hidden_layers": 4, "first_k_dense_replace": 2})
    student = student_from_layers(teacher, 2)
    assert student.config.mlp_layer_types == ["dense", "sparse"]
    assert torch.equal(student.model.layers[1].mlp.gate.weight, teacher.model.layers[2].mlp.gate.weight)
    dense = student_from_layers(teacher, 4).config
    assert (dense.num_local_experts, dense.mlp_layer_types, dense.topk_method) == (0, None, "greedy")
    deeper = smaller_student(teacher, hidden_size=64, num_hidden_layers=5)
    assert deeper.config.mlp_layer_types == ["dense", "dense", "sparse", "sparse", "dense"]
    assert deeper.config.moe_intermediate_size == 64


def test_a_smaller_student_of_a_quantized_teacher_has_float_weights(saved, tmp_path):
    student = smaller_student(get_scheme("dynamic").load(str(saved)), num_hidden_layers=1)
    student.save_pretrained(tmp_path / "student")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert not hasattr(again.config, "quantization_config")
    torch.testing.assert_close(again.state_dict(), student.state_dict(), rtol=0, atol=0)


def test_a_native_student_of_a_gpt2(make_trainer, tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    teacher = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=4, n_head=2, n_positions=128))
    student = student_from_layers(teacher, 2)
    trainer = trained(make_trainer, model=student, teacher=teacher, hidden_weight=0.1)
    assert trainer.state.global_step == 3


def test_no_checkpoint_holds_the_token_that_loaded_the_teacher(make_trainer, saved, tmp_path, monkeypatch):
    asked, load = [], distilling.load_teacher
    monkeypatch.setattr(distilling, "load_teacher", lambda *given: asked.append(given[1]) or load(*given))
    trainer = make_trainer(teacher=str(saved), teacher_model_init_kwargs={"token": "kept-to-myself"})
    assert asked == [{"revision": "main", "token": "kept-to-myself"}]
    trainer.save_model(str(tmp_path / "student"))
    written = (tmp_path / "student" / "training_args.bin").read_bytes()
    assert b"teacher_model_init_kwargs" in written and b"kept-to-myself" not in written


def test_what_cannot_work_is_refused(make_trainer, make_model, tokenizer, saved):
    from hfllm.data.tokenizer import train_tokenizer

    with pytest.raises(InputError, match=r"the teacher has 300 tokens and the student \d+: .*--sequence_level"):
        make_trainer(teacher=make_model(vocab_size=300))
    other = train_tokenizer(["zebra zoo zip zap"] * 9, vocab_size=len(tokenizer))
    with pytest.raises(InputError, match=r"token '.+' is number .* SFT on the teacher's answers"):
        make_trainer(teacher_processing_class=other)
    model = make_model()
    with pytest.raises(InputError, match="the teacher is the student itself"):
        make_trainer(model=model, teacher=model)
    with pytest.raises(InputError, match="teacher 'nowhere' could not be loaded"):
        make_trainer(teacher="nowhere")
    with pytest.raises(InputError, match=r"could not be loaded: .* unexpected keyword argument 'foo'"):
        make_trainer(teacher=str(saved), teacher_model_init_kwargs={"foo": 1})
    with pytest.raises(InputError, match="no row has a token to learn within max_length=1"):
        make_trainer(max_length=1)
    with pytest.raises(InputError, match=r"row 1: columns words; expected one of: input_ids"):
        make_trainer(rows=[ROWS[0], {"words": "x"}])
    with pytest.raises(InputError, match="every 9th layer"):
        student_from_layers(make_model(), 9)


@pytest.mark.slow
def test_a_teacher_that_does_not_fit_is_refused_before_it_is_loaded(saved, make_model, tmp_path, monkeypatch):
    model, free = make_model(), []
    monkeypatch.setattr(distillation_data, "available_memory", lambda: free[0])
    tables = 4 * model.model.embed_tokens.weight.numel()
    size, hub_id = 4 * model.num_parameters(), "someone/teacher"
    rest = size - tables
    adapter = get_peft_model(model, LoraConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapter.peft_config["default"].base_model_name_or_path = str(saved)
    adapter.save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(students, "load_weights_of", lambda *args, **settings: ("loaded", {}))
    monkeypatch.setattr(students, "load_merged", lambda adapter, *args, **settings: "loaded")
    known = AutoConfig.from_pretrained
    monkeypatch.setattr(
        AutoConfig, "from_pretrained", lambda name, **at: known(str(saved) if name == hub_id else name, **at)
    )
    for name, settings, needed in (
        (str(saved), {}, size),
        (str(saved), {"dtype": "auto"}, size),
        (str(saved), {"dtype": torch.bfloat16}, size // 2),
        (str(saved), {"torch_dtype": "float64"}, size * 2),
        (str(tmp_path / "adapter"), {}, size),
        (hub_id, {"revision": "main"}, size),
        (str(saved), {"dtype": "float32", "quantization_config": {"load_in_8bit": True}}, tables + rest // 4),
        (str(saved), {"dtype": "float32", "quantization_config": {"load_in_4bit": True}}, tables + rest // 8),
    ):
        free[:] = [needed + needed // 20]
        assert load_teacher(name, settings) == "loaded"
        free[:] = [needed - needed // 20]
        with pytest.raises(InputError, match=r"takes 0\.0 GiB, and 0\.0 GiB are free: "):
            load_teacher(name, settings)
    # It may be spread.
    assert load_teacher(str(saved), {"device_map": "auto"}) == "loaded"


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 5000 kB\n")
    monkeypatch.setattr(distillation_data, "PROC_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    one, two = distillation_data.CGROUPS
    monkeypatch.setattr(distillation_data, "CGROUPS", [(tmp_path, *one[1:]), (tmp_path, *two[1:])])
    assert distillation_data.available_memory() == 5000 * 1024
    for (_, limit, use, prefix), most in zip(distillation_data.CGROUPS, (4000, 3000), strict=True):
        (tmp_path / limit).write_text("max\n")
        (tmp_path / use).write_text("1500\n")
        (tmp_path / "memory.stat").write_text(f"anon 9\n{prefix}inactive_file 300\n{prefix}active_file 200\n")
        assert distillation_data.available_memory() == 5000 * 1024
        (tmp_path / limit).write_text(f"{most}\n")
        assert distillation_data.available_memory() == most - 1000
        (tmp_path / limit).unlink()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"beta": 1.5}, r"beta must lie in \[0, 1\]"),
        ({"soft_weight": -1.0}, "soft_weight must not be negative"),
        ({"teacher_top_k": 0}, "teacher_top_k must be at least 1"),
        ({"teacher_top_k": 4, "hidden_weight": 0.1}, "hidden_weight needs the teacher at every step"),
        ({"teacher_top_k": 4, "soft_weight": 0.0}, "its weight soft_weight is 0"),
        ({"teacher_cache_dir": "x"}, "teacher_cache_dir needs teacher_top_k"),
        ({"soft_weight": 0.0, "hard_weight": 0.0}, "nothing to learn from"),
        ({"teacher_model_revision": "a", "teacher_model_init_kwargs": {"revision": "b"}}, "a revision in teacher"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor changes no part of the loss"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(str(tmp_path), use_cpu=True, **arguments)


def test_capped_logits_are_refused_in_chunks(make_trainer, tokenizer):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    settings = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer), head_dim=16, intermediate_size=32, final_logit_softcapping=0.5,
        initializer_range=0.5, **settings,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"the teacher is of type gemma2.*--loss_chunk_size 0"):
        make_trainer(teacher=Gemma2ForCausalLM(config))
    make_trainer(teacher=Gemma2ForCausalLM(config), loss_chunk_size=0)


def test_a_student_without_a_teacher_is_plain_training(make_trainer, make_model, tokenizer):
    settings = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 1, "per_device_train_batch_size": 12}
    trainer = make_trainer(soft_weight=0.0, hard_weight=1.0, **settings)
    assert trainer.teacher is None
    trainer.train()
    model = make_model()
    batch = DistillationCollator(tokenizer.pad_token_id)(list(trainer.train_dataset))
    batch.pop("shift_labels")
    expected = model(**batch).loss
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.slow
def test_an_adapter_learns_alone(make_trainer, tmp_path):
    from peft import LoraConfig

    trainer = trained(make_trainer, peft_config=LoraConfig(target_modules=["q_proj", "lm_head"]))
    moved = [name for name, value in trainer.model.named_parameters() if value.requires_grad]
    assert moved and all("lora" in name for name in moved)
    assert trainer.state.log_history[0]["grad_norm"] > 0
    trainer.save_model()
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_an_adapter_of_a_new_student_does_not_name_the_teacher(saved):
    from peft import LoraConfig, get_peft_model

    teacher = AutoModelForCausalLM.from_pretrained(saved)
    for student in (student_from_layers(teacher, 2), smaller_student(teacher, num_hidden_layers=1)):
        adapter = get_peft_model(student, LoraConfig(target_modules=["q_proj"])).peft_config["default"]
        assert not adapter.base_model_name_or_path


def test_dropout_is_switched_off_wherever_it_is_kept(make_trainer, make_model):
    model = make_model(attention_dropout=0.5, hidden_dropout=0.5)
    make_trainer(model=model, disable_dropout=True)
    ids = torch.arange(4, 20).unsqueeze(0)
    with torch.no_grad():
        first, second = (model.train()(ids).logits for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.slow
def test_experts_stay_balanced(make_trainer, make_model):
    losses = []
    for coefficient in (0.0, 1.0):
        model = make_model(num_local_experts=4, router_aux_loss_coef=coefficient)
        trainer = trained(make_trainer, model=model, max_steps=1, per_device_train_batch_size=12)
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1] > losses[0] + 0.5


def test_tokens_and_labels_as_sft_makes_them(tokenizer):
    rows = tokenize_dataset(ROWS[:3], tokenizer, None)
    prompt, completion = tokenizer("Say red.")["input_ids"], tokenizer(" Red it is, and blue.")["input_ids"]
    assert rows[0]["input_ids"] == [*prompt, *completion, tokenizer.eos_token_id]
    assert rows[0]["labels"] == [-100] * len(prompt) + [*completion, tokenizer.eos_token_id]
    assert rows[1]["labels"] == [-100, *rows[1]["input_ids"][1:]]
    chat = ROWS[2]["prompt"] + ROWS[2]["completion"]
    assert rows[2]["input_ids"] == tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    learned = [token for token, label in zip(rows[2]["input_ids"], rows[2]["labels"], strict=True) if label != -100]
    assert tokenizer.decode(learned).startswith("Where to?<|end|>")
    columns = {"prompt": ["Go", None], "completion": [" on", None], "text": [None, "The fox is green."]}
    assert len(tokenize_dataset(Dataset.from_dict(columns), tokenizer, 9)) == 2
