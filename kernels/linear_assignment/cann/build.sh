#!/bin/bash
# Builds and installs the package of BevfnLinearAssignment:  build.sh OPS_NN [SOC]
# OPS_NN: a checkout of hicann/ops-nn that fits the installed CANN, on a machine with that CANN (see README.md).
# SOC: ascend910b (Atlas A2, the default) or ascend910_93 (Atlas A3).
set -euo pipefail

if [ $# -lt 1 ] || [ ! -f "$1/build.sh" ]; then
    echo "usage: build.sh OPS_NN [SOC], OPS_NN being a checkout of hicann/ops-nn (its build.sh is not there)" >&2
    exit 2
fi
if [ -z "${ASCEND_HOME_PATH:-}" ]; then
    echo "ASCEND_HOME_PATH is not set: source set_env.sh of the CANN toolkit first" >&2
    exit 2
fi
ops_nn=$(cd "$1" && pwd)
soc=${2:-ascend910b}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
target=$ops_nn/index/bevfn_linear_assignment

rm -rf "$target"
cp -r "$here" "$target"
cp "$here/../cpu.cpp" "$target/op_kernel_aicpu/cpu.cpp"
cd "$ops_nn"
bash build.sh --pkg --soc="$soc" --vendor_name=bevfn --ops=bevfn_linear_assignment -j"$(nproc)"
for package in build_out/cann-ops-nn-bevfn_linux-*.run; do
    "./$package"
done
echo "export ASCEND_CUSTOM_OPP_PATH=$ASCEND_HOME_PATH/opp/vendors/bevfn_nn:\${ASCEND_CUSTOM_OPP_PATH:-}"
