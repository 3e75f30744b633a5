"""trl's GRPOTrainer on a Llama of the same size, run by benchmarks/rl.py with a Python that has trl: one step for each
line of stdin, whose seconds and tokens it prints."""

import json
import os
import sys
import tempfile

with open(sys.argv[1]) as file:
    SETTINGS = json.load(file)
os.environ |= {"OMP_NUM_THREADS": str(SETTINGS["threads"]), "HF_HUB_OFFLINE": "1"}

import time

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

CLOCK = time.process_time if SETTINGS["cpu_time"] else time.perf_counter


class Turns(TrainerCallback):
    tokens = 0

    def on_step_begin(self, args, state, control, **kwargs):
        if not sys.stdin.readline():
            sys.exit()
        self.began = CLOCK()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        print(json.dumps({"seconds": CLOCK() - self.began, "tokens": self.tokens}), flush=True)


def main() -> None:
    s, turns = SETTINGS, Turns()
    torch.set_num_threads(s["threads"])
    width = 64 * s["depth"]
    config = LlamaConfig(
        vocab_size=s["vocab"],
        hidden_size=width,
        intermediate_size=-(-8 * width // 3 // 64) * 64,  # three matrices with as many weights as the MLP's two
        num_hidden_layers=s["depth"],
        num_attention_heads=s["depth"],
        num_key_value_heads=s["depth"],
        max_position_embeddings=s["seq"],
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(s["vocab"])}, unk_token="t2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t1")

    def reward(completions, completion_ids, **kwargs):
        turns.tokens = sum(len(ids) for ids in completion_ids)
        return [len(text) % 101 / 101 for text in completions]

    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder,
            use_cpu=not torch.cuda.is_available(),
            bf16=s["bf16"],
            per_device_train_batch_size=s["prompts"] * s["samples"],
            num_generations=s["samples"],
            max_completion_length=s["new"],
            generation_kwargs={"min_new_tokens": s["new"]},
            top_k=50,
            gradient_checkpointing=False,
            max_steps=s["rounds"] + 2,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        prompts = [" ".join(f"t{i}" for i in ids) for ids in s["prompt_ids"]]
        trainer = GRPOTrainer(
            model=LlamaForCausalLM(config),
            reward_funcs=reward,
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
            callbacks=[turns],
        )
        trainer.train()


if __name__ == "__main__":
    main()
