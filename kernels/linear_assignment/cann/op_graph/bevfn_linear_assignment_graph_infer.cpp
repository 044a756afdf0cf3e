#include "register/op_impl_registry.h"

namespace ops {
static ge::graphStatus InferDataTypeBevfnLinearAssignment(gert::InferDataTypeContext* context) {
  return context->SetOutputDataType(0, ge::DT_INT64);
}

IMPL_OP(BevfnLinearAssignment).InferDataType(InferDataTypeBevfnLinearAssignment);
}  // namespace ops
