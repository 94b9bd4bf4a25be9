// The device of a call: current from its beginning to its end, and not a trace of it after. No CUDA
// here, so that the tests run it with a double of the driver.
#pragma once

namespace trak_ext::cuda {

// `Driver` has, for the calling thread: Context, a pointer; context() and set_context(c), what is
// current, null for none; device() and set_device(i), the runtime's idea of it, which makes a
// context on a device that has none; CaptureMode, exchange_capture_mode(m), which returns the mode
// before, and kRelaxed.
//
// What is put back is the context, not the device's number: cudaSetDevice would make a context,
// some hundred MB, on a device that the process does not use, such as device 0 in a thread that has
// not chosen another yet. For the same reason a device counts as current only where a context is,
// since otherwise the runtime would leave one behind.
//
// The capture mode is relaxed meanwhile: a kernel is loaded when it is first asked for or launched,
// which the other modes forbid while a stream is captured. Nothing else in a call is unsafe there:
// all of its work goes to the caller's stream.
template <class Driver>
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) : before_(Driver::context()) {
    if (before_ != nullptr && Driver::device() == device) return;
    Driver::set_device(device);
    changed_ = true;
  }
  ~CurrentDevice() {
    if (changed_) Driver::set_context(before_);
  }
  CurrentDevice(const CurrentDevice&) = delete;

 private:
  struct RelaxedCapture {
    typename Driver::CaptureMode before = Driver::exchange_capture_mode(Driver::kRelaxed);
    ~RelaxedCapture() { (void)Driver::exchange_capture_mode(before); }
  };

  const RelaxedCapture relaxed_;
  const typename Driver::Context before_;
  bool changed_ = false;
};

}  // namespace trak_ext::cuda
