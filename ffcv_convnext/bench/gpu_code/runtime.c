/* A CUDA runtime and driver with one device that does nothing: enough for torch's device guards around fake tensors.

   No header is needed, so it builds with any C compiler. Compile with -DMAJOR=9 -DMINOR=0 -DMULTIPROCESSORS=132. */

typedef unsigned long long u64;

static void put(char *at, const char *text) { while ((*at++ = *text++)) {} }

int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { (void)device; return 0; }
int cudaGetDeviceCount(int *num) { *num = 1; return 0; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }
int cudaDeviceSynchronize(void) { return 0; }
int cudaStreamSynchronize(void *stream) { (void)stream; return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { (void)stream; *status = 0; return 0; }
int cudaThreadExchangeStreamCaptureMode(int *mode) { (void)mode; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags) { (void)stream; (void)event; (void)flags; return 0; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { (void)flags; *event = (void *)8; return 0; }
int cudaEventRecord(void *event, void *stream) { (void)event; (void)stream; return 0; }
int cudaEventRecordWithFlags(void *event, void *stream, unsigned flags) { (void)event; (void)stream; (void)flags; return 0; }
int cudaEventDestroy(void *event) { (void)event; return 0; }
int cudaEventQuery(void *event) { (void)event; return 0; }

/* The start of cudaDeviceProp, which CUDA 12 and 13 share: name[256], uuid[16], luid[8], luidDeviceNodeMask, then the
   fields below at their offsets. The struct is larger than what is cleared here. */
static int properties(char *p) {
  for (int i = 0; i < 400; i++) p[i] = 0;
  put(p, "do-nothing device");
  *(u64 *)(p + 288) = 80000000000ull; /* totalGlobalMem */
  *(u64 *)(p + 296) = 49152;          /* sharedMemPerBlock */
  *(int *)(p + 304) = 65536;          /* regsPerBlock */
  *(int *)(p + 308) = 32;             /* warpSize */
  *(int *)(p + 320) = 1024;           /* maxThreadsPerBlock */
  *(int *)(p + 360) = MAJOR;
  *(int *)(p + 364) = MINOR;
  *(int *)(p + 384) = MULTIPROCESSORS; /* CUDA 13 */
  *(int *)(p + 388) = MULTIPROCESSORS; /* CUDA 12 */
  return 0;
}
int cudaGetDeviceProperties(void *p, int device) { (void)device; return properties(p); }
int cudaGetDeviceProperties_v2(void *p, int device) { (void)device; return properties(p); }

/* c10::cuda: MaybeSetDevice, hasPrimaryContext, SetTargetDevice */
int _ZN3c104cuda14MaybeSetDeviceEa(signed char device) { (void)device; return 0; }
int _ZN3c104cuda17hasPrimaryContextEa(signed char device) { (void)device; return 0; }
void _ZN3c104cuda15SetTargetDeviceEv(void) {}

int cuInit(unsigned flags) { (void)flags; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { (void)device; *flags = 0; *active = 0; return 0; }
int cuCtxGetCurrent(void **context) { *context = 0; return 0; }
int cuCtxSetCurrent(void *context) { (void)context; return 0; }
int cuGetErrorString(int error, const char **text) { (void)error; *text = "no device"; return 0; }
