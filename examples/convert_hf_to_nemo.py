"""Convert a Hugging Face model (Llama, Qwen2, Qwen3 or SDAR), or one of NeMo or Megatron-Bridge, into a `.nemo` archive."""

import argparse
import sys
from pathlib import Path


def main() -> None:
    """Parse the flags that NeMo's converters have, then convert."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--input_name_or_path", type=Path, required=True, help="folder of the model, or NeMo 1.x archive"
    )
    parser.add_argument("--output_path", type=Path, required=True, help=".nemo file to write")
    parser.add_argument(
        "--precision", choices=("32", "bf16", "16"), help="of the stored weights (default: the source's)"
    )
    parser.add_argument(
        "--mask_token", help="token that stands for 'masked' (default: the tokenizer's, else an unused row)"
    )
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer (default: the model's)")
    parser.add_argument("--block_size", type=int, default=4, help="tokens per block proposed for training (default: 4)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing .nemo file")
    args = parser.parse_args()
    if args.block_size < 1:
        parser.error(f"--block_size {args.block_size}: must be at least 1")
    if not args.input_name_or_path.exists():
        sys.exit(f"error: {args.input_name_or_path} does not exist; give a local path (hub names are not downloaded)")

    from nemo_opdlm.report.quiet import quiet_imports

    quiet_imports()
    from nemo_opdlm.models.conversion import convert_hf_to_nemo

    try:
        convert_hf_to_nemo(
            args.input_name_or_path,
            args.output_path,
            precision=args.precision,
            mask_token=args.mask_token,
            tokenizer=args.tokenizer,
            block_size=args.block_size,
            overwrite=args.overwrite,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(f"wrote {args.output_path}\n")


if __name__ == "__main__":
    main()
