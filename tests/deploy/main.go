// Command deploy reads the files of deploy/ as Kubernetes would, refuses what it
// would refuse of them as far as that can be told without an API server, and does a
// kubelet's part for the example pod: it writes the CRI's configurations of sandbox
// and containers, for crictl, and prints the handler.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/yaml"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	sigsjson "sigs.k8s.io/json"
	sigsyaml "sigs.k8s.io/yaml"
)

func main() {
	dir := flag.String("deploy", "deploy", "the directory `deploy`")
	class := flag.String("class", "", "the pod's RuntimeClass; empty: its own")
	cgroup := flag.String("cgroup", "", "parent of the pod's cgroup")
	logs := flag.String("logs", "", "directory of the containers' logs")
	out := flag.String("out", "", "directory for pod.json and container-N-NAME.json; empty: check only")
	flag.Parse()
	handler, err := run(*dir, *class, *cgroup, *logs, *out)
	if err != nil {
		fmt.Fprintln(os.Stderr, "deploy:", err)
		os.Exit(1)
	}
	fmt.Println(handler)
}

func run(dir, class, cgroup, logs, out string) (handler string, err error) {
	classes, err := readClasses(filepath.Join(dir, "runtimeclass.yaml"))
	if err != nil {
		return "", err
	}
	pod, err := readPod(filepath.Join(dir, "pod.yaml"))
	if err != nil {
		return "", err
	}
	handlers, err := readHandlers(filepath.Join(dir, "containerd", "runv.toml"))
	if err != nil {
		return "", err
	}
	for name, c := range classes {
		if !slices.Contains(handlers, c.Handler) {
			return "", fmt.Errorf("RuntimeClass %s: its handler %q is none of containerd's: %v", name, c.Handler, handlers)
		}
	}
	if err := checkCRIO(filepath.Join(dir, "crio", "runv.conf"), classes["runv"]); err != nil {
		return "", err
	}
	if class == "" {
		class = *pod.Spec.RuntimeClassName
	}
	c, ok := classes[class]
	if !ok {
		return "", fmt.Errorf("pod %s: there is no RuntimeClass %q", pod.Name, class)
	}
	if out == "" {
		return c.Handler, nil
	}
	return c.Handler, translate(pod, c, cgroup, logs, out)
}

// decode reads one object of a file as an API server with strict validation of
// fields does: unknown and double ones are errors.
func decode(b []byte, kind metav1.TypeMeta, into any) error {
	var got metav1.TypeMeta
	b, err := sigsyaml.YAMLToJSONStrict(b)
	if err == nil {
		err = sigsjson.UnmarshalCaseSensitivePreserveInts(b, &got)
	}
	if err != nil {
		return err
	}
	if got != kind {
		return fmt.Errorf("is %s of %s, want %s of %s", got.Kind, got.APIVersion, kind.Kind, kind.APIVersion)
	}
	strict, err := sigsjson.UnmarshalStrict(b, into)
	return errors.Join(append(strict, err)...)
}

func documents(path string) ([][]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var list [][]byte
	r := yaml.NewDocumentDecoder(f)
	for {
		buf := make([]byte, 1<<20)
		n, err := r.Read(buf)
		if errors.Is(err, io.EOF) {
			return list, nil
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		list = append(list, buf[:n])
	}
}

func named(kind, name string, errs []string) error {
	if len(errs) > 0 {
		return fmt.Errorf("%s %q: %s", kind, name, strings.Join(errs, "; "))
	}
	return nil
}

func readClasses(path string) (map[string]*nodev1.RuntimeClass, error) {
	docs, err := documents(path)
	if err != nil {
		return nil, err
	}
	classes := make(map[string]*nodev1.RuntimeClass)
	for _, d := range docs {
		c := new(nodev1.RuntimeClass)
		if err := decode(d, metav1.TypeMeta{APIVersion: "node.k8s.io/v1", Kind: "RuntimeClass"}, c); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		// pkg/apis/node/validation: the handler is a label's name.
		if err := errors.Join(named("RuntimeClass", c.Name, validation.IsDNS1123Subdomain(c.Name)), named("handler", c.Handler, validation.IsDNS1123Label(c.Handler))); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		if c.Overhead != nil {
			if err := positive("overhead.podFixed", c.Overhead.PodFixed); err != nil {
				return nil, fmt.Errorf("%s: %w", path, err)
			}
		}
		classes[c.Name] = c
	}
	return classes, nil
}

func positive(field string, list corev1.ResourceList) error {
	for name, q := range list {
		if q.Sign() < 0 || name != corev1.ResourceCPU && name != corev1.ResourceMemory {
			return fmt.Errorf("%s: %s is %s", field, name, q.String())
		}
	}
	return nil
}

func readPod(path string) (*corev1.Pod, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	p := new(corev1.Pod)
	if err := decode(b, metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}, p); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	errs := []error{named("pod", p.Name, validation.IsDNS1123Subdomain(p.Name))}
	if p.Spec.RuntimeClassName == nil {
		errs = append(errs, errors.New("spec.runtimeClassName is missing"))
	}
	if len(p.Spec.Containers) == 0 {
		errs = append(errs, errors.New("spec.containers is empty"))
	}
	volumes := make(map[string]bool)
	for _, v := range p.Spec.Volumes {
		errs = append(errs, named("volume", v.Name, validation.IsDNS1123Label(v.Name)))
		volumes[v.Name] = true
	}
	seen := make(map[string]bool)
	for _, c := range p.Spec.Containers {
		errs = append(errs, named("container", c.Name, validation.IsDNS1123Label(c.Name)),
			positive("limits", c.Resources.Limits), positive("requests", c.Resources.Requests))
		if seen[c.Name] || c.Image == "" {
			errs = append(errs, fmt.Errorf("container %q: its name is taken, or it has no image", c.Name))
		}
		seen[c.Name] = true
		for _, m := range c.VolumeMounts {
			if !volumes[m.Name] || m.MountPath == "" {
				errs = append(errs, fmt.Errorf("container %q: volumeMounts: there is no volume %q, or no path", c.Name, m.Name))
			}
		}
		for _, port := range c.Ports {
			errs = append(errs, named("port", fmt.Sprint(port.ContainerPort), validation.IsValidPortNum(int(port.ContainerPort))))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return p, nil
}

// readHandlers lists the runtimes of containerd's CRI plugin.
func readHandlers(path string) ([]string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var f struct {
		Version int `toml:"version"`
		Plugins map[string]struct {
			Containerd struct {
				Runtimes map[string]struct {
					Type string `toml:"runtime_type"`
				} `toml:"runtimes"`
			} `toml:"containerd"`
		} `toml:"plugins"`
	}
	if err := toml.Unmarshal(b, &f); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if f.Version != 3 {
		return nil, fmt.Errorf("%s: version is %d, want 3", path, f.Version)
	}
	var names []string
	for name, r := range f.Plugins["io.containerd.cri.v1.runtime"].Containerd.Runtimes {
		if r.Type == "" {
			return nil, fmt.Errorf("%s: the runtime %s has no runtime_type", path, name)
		}
		names = append(names, name)
	}
	slices.Sort(names)
	return names, nil
}

// checkCRIO looks for the handler of a class in CRI-O's configuration.
func checkCRIO(path string, class *nodev1.RuntimeClass) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var f struct {
		CRIO struct {
			Runtime struct {
				DropInfra *bool `toml:"drop_infra_ctr"`
				Runtimes  map[string]struct {
					Type string `toml:"runtime_type"`
				} `toml:"runtimes"`
			} `toml:"runtime"`
		} `toml:"crio"`
	}
	if err := toml.Unmarshal(b, &f); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	r := f.CRIO.Runtime
	if r.DropInfra == nil || *r.DropInfra {
		return fmt.Errorf("%s: drop_infra_ctr is not false", path)
	}
	if class == nil || r.Runtimes[class.Handler].Type != "oci" {
		return fmt.Errorf("%s: there is no RuntimeClass runv, or no runtime of type oci for it", path)
	}
	return nil
}

// translate does what a kubelet does with a pod of this kind.
func translate(p *corev1.Pod, class *nodev1.RuntimeClass, cgroup, logs, out string) error {
	if len(p.Spec.Volumes)+len(p.Spec.InitContainers) > 0 {
		return errors.New("pod: volumes and initContainers are not translated")
	}
	var sum cri.LinuxContainerResources
	var containers []*cri.ContainerConfig
	for _, c := range p.Spec.Containers {
		r := resources(c.Resources)
		sum.CpuQuota += r.CpuQuota
		sum.CpuPeriod = r.CpuPeriod
		sum.CpuShares += r.CpuShares
		sum.MemoryLimitInBytes += r.MemoryLimitInBytes
		containers = append(containers, &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: c.Name},
			Image:    &cri.ImageSpec{Image: c.Image, UserSpecifiedImage: c.Image},
			Command:  c.Command, Args: c.Args, WorkingDir: c.WorkingDir,
			LogPath: c.Name + ".log",
			Linux: &cri.LinuxContainerConfig{Resources: r, SecurityContext: &cri.LinuxContainerSecurityContext{
				NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER},
			}},
		})
	}
	sandbox := &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: p.Name, Namespace: "default", Uid: "deployed-" + class.Name},
		Hostname:     p.Name,
		LogDirectory: logs,
		Linux: &cri.LinuxPodSandboxConfig{
			CgroupParent: cgroup,
			Resources:    &sum,
			SecurityContext: &cri.LinuxSandboxSecurityContext{
				NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER},
			},
		},
	}
	if class.Overhead != nil {
		sandbox.Linux.Overhead = resources(corev1.ResourceRequirements{Limits: class.Overhead.PodFixed})
	}
	for _, c := range p.Spec.Containers {
		for _, port := range c.Ports {
			sandbox.PortMappings = append(sandbox.PortMappings, &cri.PortMapping{ContainerPort: port.ContainerPort, HostPort: port.HostPort})
		}
	}
	if err := write(filepath.Join(out, "pod.json"), sandbox); err != nil {
		return err
	}
	for i, c := range containers {
		if err := write(filepath.Join(out, fmt.Sprintf("container-%d-%s.json", i, c.Metadata.Name)), c); err != nil {
			return err
		}
	}
	return nil
}

// resources are a container's in the kernel's units.
func resources(r corev1.ResourceRequirements) *cri.LinuxContainerResources {
	const period = 100000
	out := &cri.LinuxContainerResources{CpuPeriod: period}
	if q, ok := r.Limits[corev1.ResourceCPU]; ok {
		out.CpuQuota = q.MilliValue() * period / 1000
		out.CpuShares = q.MilliValue() * 1024 / 1000
	}
	if q, ok := r.Requests[corev1.ResourceCPU]; ok {
		out.CpuShares = q.MilliValue() * 1024 / 1000
	}
	if q, ok := r.Limits[corev1.ResourceMemory]; ok {
		out.MemoryLimitInBytes = q.Value()
	}
	return out
}

func write(path string, m any) error {
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o600)
}
