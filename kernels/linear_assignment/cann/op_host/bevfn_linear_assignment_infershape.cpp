#include "register/op_impl_registry.h"

namespace ops {
// match takes the shape of valid, which cost [B, Q, G] must agree with.
static ge::graphStatus InferShapeBevfnLinearAssignment(gert::InferShapeContext* context) {
  const gert::Shape* cost = context->GetInputShape(0);
  const gert::Shape* valid = context->GetInputShape(1);
  gert::Shape* match = context->GetOutputShape(0);
  if (cost == nullptr || valid == nullptr || match == nullptr) return ge::GRAPH_FAILED;
  if (cost->GetDimNum() != 3 || valid->GetDimNum() != 2) return ge::GRAPH_FAILED;
  if (cost->GetDim(0) != valid->GetDim(0) || cost->GetDim(2) != valid->GetDim(1)) return ge::GRAPH_FAILED;
  *match = *valid;
  return ge::GRAPH_SUCCESS;
}

IMPL_OP_INFERSHAPE(BevfnLinearAssignment).InferShape(InferShapeBevfnLinearAssignment);
}  // namespace ops
