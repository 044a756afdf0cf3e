// Prototype of BevfnLinearAssignment, as GE knows it: one query for each valid box at the least total cost.
#ifndef BEVFN_LINEAR_ASSIGNMENT_PROTO_H_
#define BEVFN_LINEAR_ASSIGNMENT_PROTO_H_

#include "graph/operator_reg.h"
#include "graph/types.h"

namespace ge {
// cost [B, Q, G], valid [B, G] -> match [B, G]: the query of each box, -1 for padding and for boxes left over.
REG_OP(BevfnLinearAssignment)
    .INPUT(cost, TensorType({DT_FLOAT, DT_DOUBLE}))
    .INPUT(valid, TensorType({DT_BOOL}))
    .OUTPUT(match, TensorType({DT_INT64}))
    .OP_END_FACTORY_REG(BevfnLinearAssignment)
}  // namespace ge

#endif  // BEVFN_LINEAR_ASSIGNMENT_PROTO_H_
