"""Sentence embeddings in a separate process: `python3 utils/sentence_encoder.py MODEL OUT < TEXTS.json`.

sentence-transformers imports a package called `datasets` if it finds one (meaning Hugging Face's, but in our processes
it would find ours), and torchvision and torchaudio, which fail to load with some builds of PyTorch (see
requirements-dev.txt). Texts need none of them. So utils.label_similarity runs this file, which hides them.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    """MODEL: a model's folder or hub name. OUT: the .npy file to write, float32 (N, D). Standard input: N texts."""
    project = Path(__file__).resolve().parents[1]
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() not in (project, project / "utils")]
    sys.modules.update(torchvision=None, torchaudio=None)  # as if they were not installed
    import numpy as np
    from sentence_transformers import SentenceTransformer

    model, out = sys.argv[1:]
    encoder = SentenceTransformer(model, device="cpu")  # a list of classes must not depend on the machine
    np.save(out, encoder.encode(json.load(sys.stdin), show_progress_bar=False, convert_to_numpy=True))


if __name__ == "__main__":
    main()
