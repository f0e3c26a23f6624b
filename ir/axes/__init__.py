"""Axis terms: what every index of every axis stands for, and which may be left out."""

from torchlathe.ir.axes.flow import AtomIndex, Flow
from torchlathe.ir.axes.inference import AxisMap, AxisTerms, Inference
from torchlathe.ir.axes.resize import Resize
from torchlathe.ir.axes.rule import UNKNOWN, ZERO, Layout, Rule, Value
from torchlathe.ir.axes.rules.contraction import Signature
from torchlathe.ir.axes.rules.passing import Passing
from torchlathe.ir.axes.rules.pointwise import Pointwise
from torchlathe.ir.axes.rules.shaping import Structural
from torchlathe.ir.axes.table import register_rule, rule_of, ruled_ops
from torchlathe.ir.axes.terms import ONE, Atom, Concat, Pin, Product, Term

__all__ = [
    "ONE",
    "UNKNOWN",
    "ZERO",
    "Atom",
    "AtomIndex",
    "AxisMap",
    "AxisTerms",
    "Concat",
    "Flow",
    "Inference",
    "Layout",
    "Passing",
    "Pin",
    "Pointwise",
    "Product",
    "Resize",
    "Rule",
    "Signature",
    "Structural",
    "Term",
    "Value",
    "register_rule",
    "rule_of",
    "ruled_ops",
]
