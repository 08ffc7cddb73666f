"""What a network does and costs: moments of the inputs of its layers, FLOPs, time, memory."""

from dynarank.measure._batches import copied, run
from dynarank.measure._flops import flops
from dynarank.measure._forward import Forward, call, evaluating, unfused
from dynarank.measure._latency import latency, layer_latency
from dynarank.measure._memory import peak_memory, stored_bytes
from dynarank.measure._moments import Moments, input_moments
from dynarank.measure._timing import Timing, interleaved
from dynarank.measure._trace import Trace, trace
from dynarank.measure._training import LayerMemory, Loss, StepMemory, training_memory

__all__ = [
    "Forward",
    "LayerMemory",
    "Loss",
    "Moments",
    "StepMemory",
    "Timing",
    "Trace",
    "call",
    "copied",
    "evaluating",
    "flops",
    "input_moments",
    "interleaved",
    "latency",
    "layer_latency",
    "peak_memory",
    "run",
    "stored_bytes",
    "trace",
    "training_memory",
    "unfused",
]
