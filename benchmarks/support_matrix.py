"""Write the README's table of well-known families from what was tried: `docs/families.md`, and the shipped templates.

Run as::

    python benchmarks/support_matrix.py
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
FAMILIES = ROOT / "docs" / "families.md"
PACKAGE = ROOT / "qlora_sft"
BEGIN, END = "<!-- support matrix: benchmarks/support_matrix.py -->\n", "<!-- end of the support matrix -->\n"

# What people call it -> transformers' name of the family, and the shipped template for it, if there is one. Any other
# is trained with the template that its tokenizer brings.
NAMES = {
    "Llama 3": ("llama", "llama3"),
    "Mistral": ("mistral", "mistral"),
    "Qwen 2.5": ("qwen2", "chatml"),
    "Qwen3": ("qwen3", "qwen3"),
    "Qwen3 MoE": ("qwen3_moe", "qwen3"),
    "Qwen3.5": ("qwen3_5_text", None),
    "Gemma 2": ("gemma2", "gemma"),
    "Gemma 3": ("gemma3_text", "gemma"),
    "Phi-3, Phi-4": ("phi3", "phi"),
    "gpt-oss": ("gpt_oss", None),
    "SmolLM2": ("llama", "chatml-think"),
    "SmolLM3": ("smollm3", None),
    "Mixtral": ("mixtral", "mistral"),
    "DeepSeek-V3": ("deepseek_v3", None),
    "GLM-4": ("glm4", None),
    "Granite 4": ("granitemoehybrid", None),
    "OLMo 2": ("olmo2", None),
    "LFM2": ("lfm2", None),
    "Falcon-H1": ("falcon_h1", None),
}


def families() -> dict[str, list[str]]:
    """Returns the cells of every row of `docs/families.md`: documents, recurrent, experts, MLP, norms, GGUF."""
    table = FAMILIES.read_text(encoding="utf-8").split("\n## ")[0]  # reasons follow, under the same names
    rows = re.findall(r"^\| ([\w-]+) \| (.*) \|$", table, flags=re.M)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


def matrix() -> str:
    """Returns the table, between its marks."""
    tried = families()
    heads = ["", "`model_type`", "documents", "recurrent layers", "experts", "own MLP and norms", "shipped template"]
    lines = ["| " + " | ".join([*heads, "GGUF", "Ollama"]) + " |", "|" + "---|" * 9]
    for name, (family, template) in NAMES.items():
        documents, recurrent, experts, mlp, norms, gguf = tried[family]
        gguf = "" if gguf == "no" else gguf
        fast = " and ".join(word for word, there in (("MLP", mlp), ("norms", norms)) if there)
        ollama = (PACKAGE / "export" / "go_templates" / f"{template}.gotmpl").is_file()
        said = "with tools" if gguf and ollama and knows_tools(template) else "yes" if gguf and ollama else ""
        if gguf and not ollama:
            said = "by the GGUF's template"
        cells = [
            name,
            f"`{family}`",
            documents,
            "yes" if recurrent else "",
            {"yes": "NF4, adapted"}.get(experts, experts),
        ]
        lines.append("| " + " | ".join([*cells, fast, f"`{template}`" if template else "", gguf, said]) + " |")
    return BEGIN + "\n".join(lines) + "\n" + END


def knows_tools(template: str | None) -> bool:
    """Tells whether the Go form of a shipped template writes tools."""
    return ".Tools" in (PACKAGE / "export" / "go_templates" / f"{template}.gotmpl").read_text(encoding="utf-8")


def written(readme: str) -> str:
    """Returns the text of the README with the table of today."""
    begin, end = readme.index(BEGIN), readme.index(END) + len(END)
    return readme[:begin] + matrix() + readme[end:]


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
