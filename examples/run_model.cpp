// Runs, without Python, a model that AOTInductor packed and that uses convdit's operators (docs/deploy.md):
//
//     run_model model.pt2 inputs.pt outputs.pt
//
// inputs.pt: a list of tensors written by torch.save; outputs.pt, which torch.load reads: the tuple of what the model returns.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

std::vector<at::Tensor> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  const c10::IValue list = torch::jit::pickle_load(bytes);
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& value : list.toListRef()) tensors.push_back(value.toTensor());
  return tensors;
}

void run(const std::string& model, const std::string& inputs, const std::string& outputs) {
  if (!std::ifstream(model)) throw std::runtime_error("cannot read " + model);
  torch::inductor::AOTIModelPackageLoader loader(model);
  const std::vector<at::Tensor> got = loader.run(read(inputs));
  const std::vector<c10::IValue> values(got.begin(), got.end());  // a tuple: torch.load takes no typed list
  const std::vector<char> bytes = torch::jit::pickle_save(c10::ivalue::Tuple::create(values));
  std::ofstream file(outputs, std::ios::binary);
  if (!file.write(bytes.data(), static_cast<std::streamsize>(bytes.size())).flush()) {
    throw std::runtime_error("cannot write " + outputs);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: run_model model.pt2 inputs.pt outputs.pt\n";
    return 2;
  }
  try {
    run(argv[1], argv[2], argv[3]);
  } catch (const std::exception& error) {
    std::cerr << "run_model: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
