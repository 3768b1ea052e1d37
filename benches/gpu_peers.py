"""Ceilings of a GPU as torch reaches them, and transformers' decode of Llama-3.1-8B's shape, for scripts/gpu to set beside ours."""

import time

import torch


def median(call, rounds=7, calls=10):
    """Seconds a call, by events."""
    call()
    times = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / calls)
    return sorted(times)[rounds // 2]


def ceilings():
    source = torch.randn(1 << 31, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    seconds = median(lambda: target.copy_(source))
    print(f"device copy: {2 * source.nbytes / seconds / 1e12:.2f} TB/s, read and written")
    del source, target
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = median(lambda: a @ b)
    print(f"bf16 product of 8192 x 8192 x 8192: {2 * 8192**3 / seconds / 1e12:.0f} TFLOP/s")


def transformers_decode(tokens=128):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072, rope_theta=500000.0,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
        ids = torch.randint(0, 128256, (1, 128))
    options = dict(do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.inference_mode():
        model.generate(ids, max_new_tokens=8, min_new_tokens=8, **options)
        times = []
        for n in (tokens, 1):
            torch.cuda.synchronize()
            began = time.perf_counter()
            model.generate(ids, max_new_tokens=n, min_new_tokens=n, **options)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    rate = (tokens - 1) / (times[0] - times[1])
    print(f"transformers, Llama-3.1-8B's shape in bf16, one stream: {rate:.0f} tok/s")


if __name__ == "__main__":
    if not torch.cuda.is_available():
        print("skipped: torch sees no GPU")
    else:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
        ceilings()
        transformers_decode()
