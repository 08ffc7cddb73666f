"""Checkpoints of whole training runs: tensors and JSON only, never half written, checked before anything is loaded.

A checkpoint is a folder of two files. ``tensors-<16 hex digits of its SHA-256>.safetensors`` holds every tensor under
a readable name (``model/fc1.A``, ``optimizer/state/0/exp_avg``) and can be read by safetensors alone.
``manifest.json`` holds everything else:

==================  ==================================================================================================
``format``          ``dynarank.checkpoint``
``version``         1; a reader refuses a version that it does not know
``dynarank``        version of the library that wrote it
``torch``           version of torch that wrote it
``step``            number of optimizer steps taken
``objects``         by name, the kind (``stateful``, ``generator`` or ``value``) and the state as a tree, in which
                    tensors are referred to by name (`dynarank.checkpoint.tree`)
``tensor_file``     name, length in bytes and SHA-256 of the tensor file
``tensors``         by name, shape and dtype of every tensor, and the order of its dimensions in memory where it is not
                    the usual one. Complex numbers, unsigned integers and rare 8-bit floats are stored bit by bit in
                    dtypes that every release of safetensors reads.
``checksum``        SHA-256 of all of the above as compact JSON
==================  ==================================================================================================
"""

from dynarank.checkpoint.loading import CheckpointInfo, load, load_model
from dynarank.checkpoint.saving import save, save_model

__all__ = ["CheckpointInfo", "load", "load_model", "save", "save_model"]
