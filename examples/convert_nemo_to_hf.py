"""Convert a `.nemo` archive into a Hugging Face folder: of the source's family, or in SDAR's format for serving."""

import argparse
import sys
from pathlib import Path


def main() -> None:
    """Parse the flags that NeMo's converters have, then convert."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input_name_or_path", type=Path, required=True, help=".nemo file or extracted folder")
    parser.add_argument("--hf_output_path", type=Path, required=True, help="folder to create")
    parser.add_argument(
        "--format", choices=("hf", "sdar"), default="hf", help="sdar: for SGLang and LMDeploy, Qwen3 only"
    )
    parser.add_argument("--precision", choices=("32", "bf16", "16"), help="of the written weights (default: as stored)")
    args = parser.parse_args()
    if not args.input_name_or_path.exists():
        sys.exit(f"error: {args.input_name_or_path} does not exist")

    from nemo_opdlm.report.quiet import quiet_imports

    quiet_imports()
    from nemo_opdlm.models.conversion import convert_nemo_to_hf

    try:
        note = convert_nemo_to_hf(args.input_name_or_path, args.hf_output_path, args.format, args.precision)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(f"wrote {args.hf_output_path}\n{note}")


if __name__ == "__main__":
    main()
