"""Run by the python of vLLM's environment: greedy tokens of a model, as JSON on a line."""

import json
import sys


def main() -> None:
    from vllm import LLM, SamplingParams

    directory, prompts, tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    model = LLM(
        directory,
        model_impl="transformers",
        dtype="float32",
        max_model_len=256,
        max_num_seqs=4,
        enable_prefix_caching=True,
        enforce_eager=True,
        skip_tokenizer_init=True,
        tensor_parallel_size=int(sys.argv[4]),
    )
    asked = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    answers = model.generate([{"prompt_token_ids": ids} for ids in prompts], asked)
    print(json.dumps([list(answer.outputs[0].token_ids) for answer in answers]), flush=True)


# vLLM starts processes that import this file.
if __name__ == "__main__":
    main()
