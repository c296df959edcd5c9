#pragma once

/// Exact linear attention for PyTorch: the operators of `torch.ops.elattn` as C++ functions.
#include "library.h"
#include "ops/attention.h"
#include "ops/attention_step.h"
#include "ops/feature_attention.h"
#include "ops/feature_attention_step.h"
#include "ops/grouped_linear.h"
#include "ops/merge_states.h"
#include "ops/state.h"
