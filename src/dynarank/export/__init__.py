"""Deployment: a compressed model saved with its factors, or as plain layers that need no dynarank.

`save_plain` writes one file. `save_compressed` writes a folder of two, which is complete at every instant:
``model.safetensors`` holds the state dict with the factors, every shared tensor once, and can be read by safetensors
alone. ``dynarank.json`` holds everything else:

==================  ==================================================================================================
``format``          ``dynarank.compressed``
``version``         1; a reader refuses a version that it does not know
``dynarank``        version of the library that wrote it
``torch``           version of torch that wrote it
``structure``       what every low-rank layer is (`dynarank.factorize.structure`)
``shared``          names in the state dict that are another name for a tensor in the file
``metadata``        what the caller wanted to keep with it
``bytes``           length of the tensor file
``sha256``          SHA-256 of the tensor file
``previous``        while a model is being replaced, the manifest of the model before, or null; the checksum tells
                    which of the two belongs to the tensor file that is there
==================  ==================================================================================================
"""

from dynarank.export._manifest import read_manifest
from dynarank.export.compressed import load_compressed, save_compressed
from dynarank.export.plain import PlainReport, save_plain

__all__ = ["PlainReport", "load_compressed", "read_manifest", "save_compressed", "save_plain"]
