"""Sharing a steering: the model card, and push and pull with a Hub of our own on this machine."""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace

import fake_hub
import pytest
import torch
from huggingface_hub import ModelCard

from steer_nb import SteerError, load_model, load_steering, steer, tiny_model


@pytest.fixture
def hub():
    with fake_hub.running_hub() as hub:
        yield hub


def run_with_hub(hub, tmp_path, code, token=fake_hub.TOKEN):
    "Run a program that has this Hub and an empty cache; the JSON that it prints last."
    environment = {
        **{name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"},
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


PUSH_AND_PULL = """
    import json, torch
    from steer_nb import *
    from steer_nb.testing.toy_task import toy_task, toy_tokenizer

    def outcome(call):
        try:
            return call()
        except SteerError as error:
            return str(error)

    def predictions(model):
        return evaluate(model, tokenizer, task).predictions

    task, tokenizer = toy_task(), toy_tokenizer()
    model = tiny_model("llama")
    model.config._name_or_path = "owner/base"
    before = evaluate(model, tokenizer, task)
    steering = steer(model, rank=2)
    untrained = steering.push_to_hub("me/digits")
    run = fit(model, tokenizer, task, TrainConfig(epochs=1, lr=1e-2))
    after = evaluate(model, tokenizer, task)
    results = {"before": before, "after": after}
    address = steering.push_to_hub("me/digits", run=run, results=results, license="apache-2.0")

    def pulled(**options):
        fresh = tiny_model("llama")
        load_steering(fresh, "me/digits", **options)
        return predictions(fresh)

    first = untrained.rpartition("/")[2]
    steering.model.config._name_or_path = ""
    print(json.dumps({
        "address": address,
        "same": pulled() == after.predictions,
        "first": pulled(revision=first) == before.predictions,
        "differ": after.predictions != before.predictions,
        "score": after.score,
        "interval": after.interval,
        "best_loss": run.best_loss,
        "no branch": outcome(lambda: pulled(revision="nowhere")),
        "no repository": outcome(lambda: load_steering(tiny_model("llama"), "me/nothing")),
        "no steering": outcome(lambda: load_steering(tiny_model("llama"), "me/other")),
        "no name": outcome(lambda: steering.push_to_hub("no name")),
        "branch": outcome(lambda: steering.push_to_hub("me/digits", revision="nowhere")),
        "token": outcome(lambda: steering.push_to_hub("me/digits", token="wrong")),
    }))
"""


def test_a_steering_is_pushed_and_pulled(hub, tmp_path):
    hub.add("me/other", {"config.json": b"{}"})
    found = run_with_hub(hub, tmp_path, PUSH_AND_PULL)
    assert found["same"] and found["first"] and found["differ"]
    files = hub.commits["me/digits"][-1]
    assert set(files) == {"README.md", "steering_config.json", "steering.safetensors"}
    assert found["address"].startswith(f"{hub.url}/me/digits/commit/")
    assert "no revision" in found["no branch"] or "'nowhere'" in found["no branch"]
    assert "no steering at me/nothing" in found["no repository"]
    assert "steering.safetensors" in found["no steering"]
    assert "cannot push to no name" in found["no name"]
    assert "cannot push to me/digits" in found["branch"] and "nowhere" in found["branch"]
    assert "cannot push to me/digits" in found["token"] and "hf auth login" in found["token"]

    assert "POST /api/validate-yaml" in hub.asked
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "owner/base" and card.data.license == "apache-2.0"
    assert card.data.library_name == "steer_nb" and card.data.base_model_relation == "adapter"
    (measured,) = card.data.eval_results
    assert measured.metric_value == pytest.approx(found["score"], abs=1e-4)
    assert (measured.dataset_name, measured.dataset_split) == ("digits", "test")
    low, high = found["interval"]
    assert f"{found['score']:.3f} ({low:.3f} to {high:.3f})" in card.text
    assert f"{found['best_loss']:.3f} after" in card.text
    assert "load_steering(model, 'me/digits')" in card.text
    shown = card.text.partition("```python\n")[2].partition("```")[0]
    compile(shown, "card", "exec")


def test_a_card_that_the_hub_does_not_accept_is_not_uploaded(hub, tmp_path):
    code = """
        import json
        from steer_nb import SteerError, steer, tiny_model
        from steer_nb.core import hub

        hub.HUB_ID = ".*"  # so that a name which is no Hub id stands as the base model
        model = tiny_model("llama")
        model.config._name_or_path = "a folder"
        try:
            steer(model).push_to_hub("me/wrong")
        except SteerError as error:
            print(json.dumps(str(error)))
    """
    assert "base_model" in run_with_hub(hub, tmp_path, code)
    assert hub.commits["me/wrong"] == [{}]


def test_a_hub_that_cannot_be_reached(hub, tmp_path):
    code = """
        import json
        from steer_nb import SteerError, load_steering, steer, tiny_model

        messages = []
        for call in (
            lambda: steer(tiny_model("llama")).push_to_hub("me/mine"),
            lambda: load_steering(tiny_model("llama"), "me/mine"),
        ):
            try:
                call()
            except SteerError as error:
                messages.append(str(error))
        print(json.dumps(messages))
    """
    hub.url = "http://127.0.0.1:9"  # where nothing listens
    push, pull = run_with_hub(hub, tmp_path, code)
    assert "cannot push to me/mine" in push and "no steering at me/mine" in pull
    assert "\n" not in push + pull


def test_other_tools_find_the_base_model(hub, tmp_path):
    "PEFT and TRL load the base model, or its tokenizer, by the name that `load_model` gives."
    from steer_nb.data.wheels import MODELS
    from steer_nb.testing.toy_task import toy_tokenizer

    base = tmp_path / "base"
    tiny_model("llama").save_pretrained(base)
    toy_tokenizer().save_pretrained(base)
    repo = MODELS["smollm2-135m"].hub
    hub.add(repo, {path.name: path.read_bytes() for path in base.iterdir()})
    code = f"""
        import json, torch
        from datasets import Dataset
        from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
        from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
        from steer_nb import load_model, steer
        from steer_nb.data import models

        # The short name with a small model in place of the real weights.
        models.converted_folder = lambda name: models.Path({str(base)!r})
        model, tokenizer = load_model("smollm2-135m", device="cpu")
        get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained("lora")
        loaded = AutoPeftModelForCausalLM.from_pretrained("lora")

        model, tokenizer = load_model("smollm2-135m", device="cpu")
        steer(model)
        options = dict(output_dir="out", max_steps=1, report_to=[], use_cpu=True, bf16=False)
        rows = Dataset.from_list([{{"prompt": "1", "completion": " 2"}}] * 8)
        sft = SFTTrainer(model, SFTConfig(**options), train_dataset=rows)
        sft.train()
        rows = Dataset.from_list([{{"prompt": "1", "chosen": " 2", "rejected": " 3"}}] * 8)
        dpo = DPOTrainer(model, None, DPOConfig(**options), train_dataset=rows)
        names = [loaded.peft_config["default"].base_model_name_or_path]
        names += [trainer.processing_class.name_or_path for trainer in (sft, dpo)]
        print(json.dumps(names))
    """
    assert run_with_hub(hub, tmp_path, code) == [repo, repo, repo]
    assert any(line.endswith("model.safetensors") for line in hub.asked)


def test_texts_from_outside_do_not_break_the_card(tmp_path, monkeypatch):
    from steer_nb import evaluate
    from steer_nb.testing.toy_task import toy_task, toy_tokenizer

    model, task = tiny_model("llama"), toy_task()
    tiny_model("llama").save_pretrained(tmp_path / "secret" / "base")
    monkeypatch.chdir(tmp_path)
    model.config._name_or_path = "secret/base"  # a folder, and not the Hub id that it looks like
    result = evaluate(model, toy_tokenizer(), task)
    result = replace(result, task="a|b\n---\nc", note="x\n# A title")
    card = steer(model).model_card("me/x", results=result)
    assert card.data.base_model is None and "secret" not in str(card)
    assert "| a\\|b --- c |" in card.text and "Data: x # A title." in card.text


def test_a_pinned_model_has_its_hub_name_and_a_note(tmp_path):
    model, _ = load_model("smollm2-135m", device="cpu")
    steer(model).save(tmp_path)
    base = json.loads((tmp_path / "steering_config.json").read_text())["base"]
    assert base["name"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert base["note"] == "weights dequantized from SmolLM2-135M-Instruct.Q4_1.gguf"
    with torch.no_grad():  # as on the Hub, where the weights have more bits
        model.model.embed_tokens.weight.mul_(1.05)
    with pytest.raises(SteerError, match=r"Instruct' \('weights dequantized from SmolLM2.*gguf'\)"):
        load_steering(model, tmp_path, name="again")


def test_a_resized_vocabulary(tmp_path):
    model = tiny_model("llama")
    steer(model, name="small").save(tmp_path / "small")
    model.resize_token_embeddings(108, mean_resizing=False)
    load_steering(model, tmp_path / "small", name="other")
    steer(model, name="large").save(tmp_path / "large")
    with pytest.raises(SteerError, match="the vocabulary has 100 tokens, not 108"):
        load_steering(tiny_model("llama"), tmp_path / "large")
    with torch.no_grad():
        model.get_input_embeddings().weight[:100].mul_(-1)
    with pytest.raises(SteerError, match="the weights of its embedding are different"):
        load_steering(model, tmp_path / "small", name="third")


def test_the_program_shares_what_it_trained(hub, tiny, tmp_path):
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(40)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code = f"""
        import json
        from typer.testing import CliRunner
        from steer_nb.cli.cli import app

        def command(*words):
            done = CliRunner().invoke(app, [*words, "--model", {str(tiny)!r}])
            return done.exit_code, done.stdout + done.stderr

        data = ("--data", "sums.jsonl")
        results = ("--result", "after.json", "--license", "mit")
        print(json.dumps([
            command("train", *data, "--output", "run"),
            command("evaluate", *data, "--steering", "run", "--output", "after.json"),
            command("push", "run", "me/sums", *results),
            command("evaluate", *data, "--steering", "me/sums", "--output", "again.json"),
            command("train", *data, "--output", "lora", "--method", "lora"),
            command("push", "lora", "me/lora"),
        ]))
    """
    *done, (code, message) = run_with_hub(hub, tmp_path, code)
    assert [code for code, _ in done] == [0] * 5, done
    assert code == 1 and "push is for one steering, and lora has 0" in message
    after, again = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("after", "again"))
    assert after["predictions"] == again["predictions"]
    card = ModelCard(hub.commits["me/sums"][-1]["README.md"].decode())
    assert card.data.license == "mit" and "| sums" in card.text and "## Training" in card.text
    assert card.data.eval_results[0].metric_value == pytest.approx(after["score"], abs=1e-4)


def test_results_of_one_name_are_an_error(tmp_path, tiny):
    from program import run

    from steer_nb import evaluate, load_records

    result = evaluate(
        *load_model(tiny), load_records({"test": [{"prompt": "1", "completion": "2"}]})
    )
    paths = [result.save(tmp_path / name / "same.json") for name in ("a", "b")]
    words = [word for path in paths for word in ("--result", path)]
    code, _, err = run("push", tmp_path, "me/mine", *words, "--model", tiny)
    assert code == 1 and "two results have the same file name" in err
