// Every kernel, as one program.
#include "attention.cu"
#include "heads.cu"
#include "linear.cu"
#include "norm.cu"
#include "optimizer.cu"
#include "rows.cu"
#include "weights.cu"
