"""Writes a model card (README.md) from what a run recorded. It names files and folders, but never their paths."""

from __future__ import annotations

import json
import re
from pathlib import Path

from qlora_sft.config_lora import describe_lora
from qlora_sft.errors import RunError
from qlora_sft.model.run_base import described_base
from qlora_sft.run.folder import Run
from qlora_sft.run.report import Pair, RunReport

UNKNOWN = "not measured"
# The base model, and its licence, for which `model.path: demo` stands.
DEMO = ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
LIBRARIES = {"adapter": "peft", "merged": "transformers", "gguf": "gguf"}


def model_card(run: Path, repo: str, what: str, ggufs: list[str]) -> str:
    """Returns the text of the card.

    ``what`` is adapter, merged or gguf. ``ggufs`` are the names of the GGUF files that are uploaded.
    """
    opened = Run.open(run)
    parity = opened.exports.get("parity", {})
    base, licence = base_name(opened), base_licence(opened)
    parts = [
        _front_matter(base, licence, what),
        f"# {repo.split('/')[-1]}\n\n{_about(opened, base, licence)}",
        "## Results on held-out data\n\n" + _results(opened.report),
        "## Training data\n\n" + _data(opened),
        "## Training\n\n" + _training(opened),
        *(["## Exports against the trained model\n\n" + _parity(parity)] if parity else []),
        "## How to run it\n\n" + _usage(repo, what, base, opened, ggufs),
    ]
    return "\n\n".join(parts) + "\n"


def base_name(run: Run) -> str:
    """Returns the Hub id of the base, or the name of its folder."""
    if run.model.path == "demo":
        return DEMO[0]
    base = Path(run.base)
    return base.name if base.expanduser().is_absolute() or base.is_dir() else run.base


def base_licence(run: Run) -> str | None:
    """Returns the licence that the base's own card states, or None if the base has no card here."""
    if run.model.path == "demo":
        return DEMO[1]
    try:
        card = Path(described_base(run)) / "README.md"
    except RunError:
        return None
    if not card.is_file():
        return None
    front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), flags=re.S)
    found = re.search(r"^license:\s*([\w.+-]+)\s*$", front[1], flags=re.M) if front else None
    return found[1] if found else None


def _front_matter(base: str, licence: str | None, what: str) -> str:
    lines = [
        *([f"license: {licence}"] if licence else []),
        *([f"base_model: {base}"] if "/" in base else []),
        f"library_name: {LIBRARIES[what]}",
        "pipeline_tag: text-generation",
        "tags: [qlora, lora, sft, qlora_sft]",
    ]
    return "---\n" + "\n".join(lines) + "\n---"


def _about(run: Run, base: str, licence: str | None) -> str:
    lora = run.config.lora
    kind = "NF4 (4-bit) weights" if run.model.load_in_4bit else "16-bit weights"
    of_base = f"Licence of the base: {licence}." if licence else "Licence: that of the base model; see there."
    link = f"[{base}](https://huggingface.co/{base})" if "/" in base else base
    commit = f" at commit `{run.base_commit}`" if run.base_commit else ""
    return (
        f"{link}{commit}, fine-tuned with {describe_lora(lora)} and alpha {lora.alpha} on {kind} by "
        f"qlora_sft {run.versions.get('qlora-sft', '')}.\n\n{of_base}"
    )


def _results(report: RunReport) -> str:
    rows = []
    for name in report.loss or report.exact_match:
        loss, match = report.loss.get(name), report.exact_match.get(name)
        rows.append([name, *_figures(loss, ".3f"), *_figures(match, ".1%")])
    if not rows:
        failed = any(": not measured (" in text for text in report.warnings)
        return "Not measured." if failed else "Not measured: the run had no held-out data."
    return _table(["source", "loss before", "loss after", "exact match before", "exact match after"], rows)


def _figures(pair: Pair | None, form: str) -> list[str]:
    """Returns a figure before and after training as cells of a table."""
    values = (pair.before, pair.after) if pair else (None, None)
    return [UNKNOWN if value is None else format(value, form) for value in values]


def _data(run: Run) -> str:
    rows = []
    total = sum(row["supervised"] for row in run.data.values()) or 1
    for name, row in run.data.items():
        share = f"{row['supervised'] / total:.1%}"
        digest = f"`{row['sha256'][:16]}`" if row["sha256"] else f"Hub: {row['path']}"
        counts = [f"{row[key]:,}" for key in ("read", "kept", "tokens", "supervised")]
        rows.append([name, *counts, share, digest])
    head = ["source", "rows read", "rows kept", "tokens", "supervised tokens", "of all supervised", "sha256"]
    return _table(head, rows) + f"\n\nMixture: `{json.dumps(run.config.data.mixture)}`"


def _training(run: Run) -> str:
    report, config, template = run.report, run.config, run.model.chat_template
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    lines = [
        f"{report.steps:,} steps on {report.tokens:,} tokens ({report.supervised_tokens:,} supervised)",
        f"loss {report.train_loss.first:.3f} -> {report.train_loss.last:.3f}",
        f"learning rate {config.training.learning_rate:g}, {report.optimizer}",
        f"rows of up to {config.data.max_length:,} tokens",
        f"chat template: {Path(template).name if template else 'the one of the base'}; it is in the files here",
        f"seed {config.seed}; {versions}",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _parity(parity: dict[str, dict[str, float]]) -> str:
    rows = [
        [form, f"{each['top1']:.2%}", f"{each['kl']:.1e}", f"{each['tokens']:,}"]
        for form, each in sorted(parity.items())
    ]
    return _table(["format", "same likeliest token", "mean KL (nats)", "tokens"], rows)


def _loader(run: Run) -> str:
    """Returns the name of the class by which transformers loads the base and what was merged onto it."""
    from transformers import AutoConfig

    from qlora_sft.model.meta_model import auto_class

    try:
        return auto_class(AutoConfig.from_pretrained(described_base(run), trust_remote_code=False)).__name__
    except (RunError, OSError, ValueError):  # it is gone, or has code of its own
        return "AutoModelForCausalLM"


def _usage(repo: str, what: str, base: str, run: Run, ggufs: list[str]) -> str:
    if what == "gguf":
        file = ggufs[0]
        name = file.removesuffix(".gguf")
        return (
            f"```sh\nhf download {repo} --local-dir {name}\nllama-cli -m {name}/{file}\n"
            f"ollama create {name} -f {name}/{name}.Modelfile && ollama run {name}\n```"
        )
    loader, commit = _loader(run), run.base_commit
    stop = ""
    load = f'model = {loader}.from_pretrained("{repo}", dtype="auto", device_map="auto")'
    imports = f"from transformers import {loader}, AutoTokenizer"
    if what == "adapter":
        imports = "from peft import PeftModel\n" + imports
        stop = ", eos_token_id=tokenizer.eos_token_id"  # the base may only know a token that ends no turn
        revision = f'revision="{commit}", ' if commit else ""
        load = (
            f'base = {loader}.from_pretrained("{base}", {revision}dtype="auto", device_map="auto")\n'
            f'model = PeftModel.from_pretrained(base, "{repo}")'
        )
    return (
        f'```python\n{imports}\n\n{load}\ntokenizer = AutoTokenizer.from_pretrained("{repo}")\n'
        'messages = [{"role": "user", "content": "Hello"}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n)\n'
        f"output = model.generate(**inputs.to(model.device), max_new_tokens=256{stop})\n"
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))\n```'
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
