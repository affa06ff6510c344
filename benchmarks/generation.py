"""How much faster are answers that are generated in batches of similar length than the same answers one by one?

The embedded 135M model in NF4 answers questions of GSM8K greedily, as `evaluate` asks a run, in batches and one by one.
Products of another size round in another way, which in bfloat16 may turn a word, so the same answers are counted::

    OMP_NUM_THREADS=1 python benchmarks/generation.py --data FOLDER --dtype float32
    OMP_NUM_THREADS=2 python benchmarks/generation.py --data FOLDER

FOLDER holds gsm8k_test.jsonl.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from measuring import clock, measured_on

from qlora_sft.data.template import choose_chat_format
from qlora_sft.demo import base_model_path
from qlora_sft.evaluation import generate
from qlora_sft.evaluation.evaluated_model import EvaluatedModel
from qlora_sft.evaluation.kept import Generated
from qlora_sft.model.base_tokenizer import read_tokenizer
from qlora_sft.model.load import compute_dtype, disable_inference_repacking, load_base

RESULTS = Path(__file__).parent / "results" / "generation.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of gsm8k_test.jsonl")
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    base = str(base_model_path())
    dtype, _ = compute_dtype(args.dtype)
    tokenizer = read_tokenizer(base)
    model = load_base(base, dtype, load_in_4bit=True).eval()
    disable_inference_repacking(model)
    chat_format = choose_chat_format(tokenizer, {tokenizer.convert_tokens_to_ids("<|im_end|>")})
    evaluated = EvaluatedModel(model, tokenizer, chat_format, dtype)
    lines = (args.data / "gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()[: args.questions]
    asked = [[{"role": "user", "content": json.loads(line)["question"]}] for line in lines]
    prompts = [
        tokenizer.apply_chat_template(each, add_generation_prompt=True, return_dict=True)["input_ids"] for each in asked
    ]
    most, answers, seconds = generate.PROMPTS, {}, {}
    for provider, size in (("batched", most), ("one by one", 1)):
        generate.PROMPTS = size
        answers[provider], seconds[provider] = timed(evaluated, prompts, args.max_new_tokens)
    equal = sum(a == b for a, b in zip(answers["batched"], answers["one by one"], strict=True))
    with args.output.open("a") as results:
        for provider, given in answers.items():
            tokens = sum(len(answer.ids) + answer.ended for answer in given)
            row = {
                **measured_on("generation"), "provider": provider, "dtype": str(dtype).removeprefix("torch."),
                "rows": len(prompts), "tokens": tokens, "equal": equal, "seconds": round(seconds[provider], 1),
                "tokens_per_second": round(tokens / seconds[provider], 1),
                "ratio": f"{seconds['one by one'] / seconds[provider]:.2f}x",
            }  # fmt: skip
            print(row, flush=True)
            results.write(json.dumps(row) + "\n")


def timed(evaluated: EvaluatedModel, prompts: list[list[int]], new_tokens: int) -> tuple[list[Generated], float]:
    begin = clock()
    given = generate.generate(evaluated, prompts, new_tokens)
    return given, clock() - begin


if __name__ == "__main__":
    main()
