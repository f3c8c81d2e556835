"""Run by the python of vLLM's environment: what a model goes on with, as JSON on a line.

Prints greedy tokens of each prompt, or with the setting ``"prompt_logprobs"`` the log probability
of each of its tokens but the first.
"""

import json
import sys


def main() -> None:
    from vllm import LLM, SamplingParams

    directory, prompts, settings = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    model = LLM(
        directory,
        model_impl=settings["model_impl"],
        dtype=settings["dtype"],
        max_model_len=256,
        max_num_seqs=4,
        enable_prefix_caching=True,
        enforce_eager=True,
        skip_tokenizer_init=True,
        tensor_parallel_size=settings["tensor_parallel"],
    )
    asked = SamplingParams(
        temperature=0,
        max_tokens=settings["tokens"],
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=0 if settings["prompt_logprobs"] else None,
    )
    answers = model.generate([{"prompt_token_ids": ids} for ids in prompts], asked)
    if settings["prompt_logprobs"]:
        found = [
            [one[id_].logprob for id_, one in zip(ids, answer.prompt_logprobs, strict=True) if one]
            for ids, answer in zip(prompts, answers, strict=True)
        ]
    else:
        found = [list(answer.outputs[0].token_ids) for answer in answers]
    print(json.dumps(found), flush=True)


# vLLM starts processes that import this file.
if __name__ == "__main__":
    main()
