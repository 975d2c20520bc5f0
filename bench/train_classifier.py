"""Train the sentiment classifier that the benches of best-of-N use as their reward, or say what is there already.

python bench/train_classifier.py --data ../shared/data --start ../shared/models/small2m
"""

import argparse
import sys
from pathlib import Path

from harness.classifier import classifier, training_report


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--start", type=Path, default=Path("../shared/models/small2m"))
    options = parser.parse_args(argv)
    directory = classifier(options.data, options.start)
    report = training_report(directory)
    print(f"{directory}: {report['parameters'] / 1e6:.2f} M parameters, {report['trained_on']} texts")
    for source, accuracy in report["accuracy"].items():
        print(f"accuracy on held-out {source}: {accuracy:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
