"""The operators that TensorRT's parser supports, and the error for a graph with any other."""

import itertools

import onnx
import pytest
from onnx import TensorProto, helper

from trt.export.operators import SUPPORTED, OperatorUnsupported, check_operators, uses_in


def written(path, nodes, elem_type=TensorProto.FLOAT, domains=("",)):
    """A graph from `x` to `y`, both of this type."""
    ends = [helper.make_tensor_value_info(name, elem_type, ["n", 4]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:])
    imports = [helper.make_opsetid(domain, 22 if not domain else 1) for domain in domains]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    return path


def test_a_graph_of_known_operators_is_taken(tmp_path):
    nodes = [helper.make_node("Gelu", ["x"], ["g"]), helper.make_node("Softmax", ["g"], ["y"])]

    check_operators(written(tmp_path / "pair.onnx", nodes))


def test_an_unsupported_operator_is_reported_with_its_node(tmp_path):
    path = written(
        tmp_path / "pair.onnx", [helper.make_node("BitwiseNot", ["x"], ["y"], name="node_3")], TensorProto.INT32
    )

    with pytest.raises(
        OperatorUnsupported, match=r"pair\.onnx: BitwiseNot \(node 'node_3'\) is not on the parser's list"
    ):
        check_operators(path)


def test_an_operator_of_another_domain_is_reported_with_the_domain(tmp_path):
    node = helper.make_node("Gelu", ["x"], ["y"], name="n", domain="com.microsoft")

    with pytest.raises(OperatorUnsupported, match=r"com\.microsoft::Gelu"):
        check_operators(written(tmp_path / "pair.onnx", [node], domains=("", "com.microsoft")))


@pytest.mark.parametrize(
    ("operator", "elem_type", "said"),
    [
        ("Relu", TensorProto.DOUBLE, "does not accept DOUBLE"),
        ("Softmax", TensorProto.DOUBLE, "does not accept DOUBLE"),
        ("Identity", TensorProto.UINT8, "does not accept UINT8"),
        ("Neg", TensorProto.INT8, "does not accept INT8"),
    ],
)
def test_a_type_that_an_operator_does_not_accept_is_reported(tmp_path, operator, elem_type, said):
    with pytest.raises(OperatorUnsupported, match=rf"{operator} .*{said}"):
        check_operators(written(tmp_path / "pair.onnx", [helper.make_node(operator, ["x"], ["y"])], elem_type))


def test_bytes_may_be_cast_and_nothing_else(tmp_path):
    cast = helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT)
    back = helper.make_node("Cast", ["f"], ["y"], to=TensorProto.UINT8)
    shape = helper.make_node("Shape", ["x"], ["s"], name="shape")

    check_operators(written(tmp_path / "good.onnx", [cast, back], TensorProto.UINT8))
    with pytest.raises(OperatorUnsupported, match=r"Shape \(node 'shape'\) does not accept UINT8"):
        check_operators(written(tmp_path / "bad.onnx", [cast, shape, back], TensorProto.UINT8))


def test_of_many_the_first_are_named(tmp_path):
    names = ["x", *(f"v{number}" for number in range(6)), "y"]
    nodes = [helper.make_node("Det", [one], [other]) for one, other in itertools.pairwise(names)]

    with pytest.raises(OperatorUnsupported, match="and 2 more"):
        check_operators(written(tmp_path / "pair.onnx", nodes))


def test_a_use_knows_the_types_of_its_inputs(tmp_path):
    [use] = uses_in(written(tmp_path / "pair.onnx", [helper.make_node("Add", ["x", "x"], ["y"])]))

    assert (use.operator, use.types) == ("Add", ("FLOAT", "FLOAT"))


def test_the_table_speaks_of_operators_that_onnx_has():
    known = {schema.name for schema in onnx.defs.get_all_schemas()}

    assert SUPPORTED.keys() <= known
