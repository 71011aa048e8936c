"""Check that the packages are installed; scripts import it before them, so that a missing one is one line on stderr."""

import sys
from importlib.util import find_spec
from pathlib import Path

NEEDED = ('torch', 'torchvision', 'numpy', 'PIL', 'simplejpeg', 'scipy', 'tqdm')

if missing := [name for name in NEEDED if find_spec(name) is None]:
    requirements = Path(__file__).resolve().parent.parent / 'requirements.txt'
    print(
        f'{sys.argv[0]}: error: {sys.executable} has no {", ".join(missing)}; run: pip install -r {requirements}',
        file=sys.stderr,
    )
    sys.exit(2)
