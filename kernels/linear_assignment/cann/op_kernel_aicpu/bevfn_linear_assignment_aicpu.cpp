// BevfnLinearAssignment on the chip's AI CPU: checks what it is given and calls match.h.
#include "cpu_kernel.h"
#include "match.h"

namespace {
const char* const kBevfnLinearAssignment = "BevfnLinearAssignment";
constexpr uint32_t kSuccess = 0, kInvalid = 1;
}  // namespace

namespace aicpu {
class BevfnLinearAssignmentCpuKernel : public CpuKernel {
 public:
  ~BevfnLinearAssignmentCpuKernel() override = default;

  uint32_t Compute(CpuKernelContext& context) override {
    Tensor* cost = context.Input(0);
    Tensor* valid = context.Input(1);
    Tensor* match = context.Output(0);
    if (cost == nullptr || valid == nullptr || match == nullptr) return kInvalid;
    if (valid->GetDataType() != DT_BOOL || match->GetDataType() != DT_INT64) return kInvalid;
    const std::vector<int64_t> size = cost->GetTensorShape()->GetDimSizes();  // B Q G
    if (size.size() != 3 || valid->NumElements() != size[0] * size[2]) return kInvalid;
    if (match->NumElements() != valid->NumElements()) return kInvalid;
    switch (cost->GetDataType()) {
      case DT_FLOAT: return Solve<float>(*cost, *valid, *match, size);
      case DT_DOUBLE: return Solve<double>(*cost, *valid, *match, size);
      default: return kInvalid;
    }
  }

 private:
  template <class T>
  static uint32_t Solve(const Tensor& cost, const Tensor& valid, const Tensor& match, const std::vector<int64_t>& size) {
    if (valid.NumElements() == 0) return kSuccess;
    bevfn::match(static_cast<const T*>(cost.GetData()), static_cast<const uint8_t*>(valid.GetData()),
                 static_cast<int64_t*>(match.GetData()), size[0], size[1], size[2]);
    return kSuccess;
  }
};

REGISTER_CPU_KERNEL(kBevfnLinearAssignment, BevfnLinearAssignmentCpuKernel);
}  // namespace aicpu
