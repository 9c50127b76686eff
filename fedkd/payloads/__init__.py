"""Knowledge that travels: typed payloads, their bytes, their checks, and their form as Flower records.

A message carries one `Knowledge`: at most one payload of each kind, the number of examples behind it, and
scalar metrics. On the wire every payload is one ``ArrayRecord`` named after its kind, and a ``ConfigRecord``
``<kind>.meta`` for what is not an array; so stock Flower strategies can average a reply that holds weights.

Tensors of received knowledge share the memory of the message, which other clients of the process may be reading too:
clone them before changing them in place.
"""

from fedkd.payloads.base import Payload, State, all_finite
from fedkd.payloads.classes import ClassWeights, TeacherWeights
from fedkd.payloads.codes import OutputCodec, QuantizedOutputs
from fedkd.payloads.knowledge import CONFIG, KINDS, MAX_METRIC, METRICS, NUM_EXAMPLES, Knowledge
from fedkd.payloads.outputs import ClassOutputs, ProxyOutputs, Request
from fedkd.payloads.peers import PeerOutputs
from fedkd.payloads.samples import LabelCounts, SampleScores
from fedkd.payloads.samples_own import FeatureMaps, SampleKnowledge
from fedkd.payloads.weights import Weights

__all__ = [
    "CONFIG",
    "KINDS",
    "MAX_METRIC",
    "METRICS",
    "NUM_EXAMPLES",
    "ClassOutputs",
    "ClassWeights",
    "FeatureMaps",
    "Knowledge",
    "LabelCounts",
    "OutputCodec",
    "Payload",
    "PeerOutputs",
    "ProxyOutputs",
    "QuantizedOutputs",
    "Request",
    "SampleKnowledge",
    "SampleScores",
    "State",
    "TeacherWeights",
    "Weights",
    "all_finite",
]
