"""Check that LoRA adapters are exchangeable with the peft package. Needs `peft`, `transformers`.

    python -m docs.peft_parity

On random tiny weights: PEFT loads the adapter that save_model writes, and transformers the merged
model. Then load_params loads adapters that PEFT writes, for some or all layers and various scales.
"""

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import model
from tests.common import FORMULA_TOKENS, formula_model


def randomised(lora):
    """The adapter with random weights; B is initialised to zero, which would hide errors."""
    generator = torch.Generator().manual_seed(0)
    return {name: 0.1 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in lora.items()}


@torch.inference_mode()
def main():
    params, config = formula_model(tied=False)
    bare = model.forward(params, config, FORMULA_TOKENS)

    def load(path):
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    def compare(label, ours, other):
        gap = (ours - other(FORMULA_TOKENS).logits).abs().max().item()
        moved = (ours - bare).abs().max().item()
        print(f"{label}: logits differ by at most {gap:.1e}; the adapter moves them by {moved:.1f}")
        assert gap < 1e-5 < 0.1 < moved, label

    with tempfile.TemporaryDirectory() as scratch:
        base, tuned, theirs = (Path(scratch) / name for name in ("base", "tuned", "theirs"))
        model.save_model(base, params, config, model.ROOT / "data" / "tiny")
        params |= randomised(model.init_lora(config, 4, seed=0))
        model.save_model(tuned, params, config, like=base)
        ours = model.forward(params, config, FORMULA_TOKENS)
        compare("our adapter, loaded by PEFT", ours,
                PeftModel.from_pretrained(load(base), tuned / "adapter"))
        compare("our merged model, loaded by transformers", ours, load(tuned))

        every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        for targets, changes in ((["q_proj", "v_proj"], {"lora_alpha": 16}),
                                 (every, {"lora_alpha": 8, "use_rslora": True}),
                                 (every, {"lora_alpha": 4, "layers_to_transform": [1]})):
            peft_model = get_peft_model(load(base), LoraConfig(
                r=8, target_modules=targets, task_type="CAUSAL_LM", **changes))
            state = dict(peft_model.named_parameters())
            state = {name: tensor for name, tensor in state.items() if "lora_" in name}
            peft_model.load_state_dict(randomised(state), strict=False)
            peft_model.save_pretrained(theirs)
            params = model.load_params(base, adapter=theirs)
            compare(f"PEFT's adapter, {', '.join(targets)}, {changes}",
                    model.forward(params, config, FORMULA_TOKENS), peft_model)


if __name__ == "__main__":
    main()
