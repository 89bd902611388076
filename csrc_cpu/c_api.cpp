#include "../csrc_shared/c_api.h"

namespace bnb {

float first_entry(const float* code, Stream) { return *code; }

}  // namespace bnb
