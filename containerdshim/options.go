package containerdshim

import (
	"fmt"
	"os"
	"path/filepath"

	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/hyperhq/runv/config"
	"github.com/hyperhq/runv/state"
)

// ConfigEnv names the environment variable with the path of the configuration
// file, for when containerd's options name none. containerd passes its own
// environment on.
const ConfigEnv = "RUNV_CONFIG"

// settings is what a container is made with beside its bundle.
type settings struct {
	config  config.Config
	systemd bool
	// root is the directory of the store.
	root string
}

// loadSettings reads the configuration that containerd's options ask for: the
// generic runtime options (ConfigPath, ConfigBody), or those of the runc shim, of
// which Root and SystemdCgroup mean the same here.
func loadSettings(options *anypb.Any, namespace string) (*settings, error) {
	s := new(settings)
	var path, base string
	var body []byte
	switch options.GetTypeUrl() {
	case "":
	case typeURL(&runtimeoptions.Options{}):
		var o runtimeoptions.Options
		if err := proto.Unmarshal(options.Value, &o); err != nil {
			return nil, fmt.Errorf("options: %w", err)
		}
		path, body = o.ConfigPath, o.ConfigBody
	case typeURL(&runcoptions.Options{}):
		var o runcoptions.Options
		if err := proto.Unmarshal(options.Value, &o); err != nil {
			return nil, fmt.Errorf("options: %w", err)
		}
		base, s.systemd = o.Root, o.SystemdCgroup
	default:
		return nil, fmt.Errorf("options: %s is of no type that this shim knows, which are %s and %s",
			options.TypeUrl, typeURL(&runtimeoptions.Options{}), typeURL(&runcoptions.Options{}))
	}
	if path == "" && len(body) == 0 {
		path = os.Getenv(ConfigEnv)
	}
	c, err := config.Load(path)
	if err != nil {
		return nil, err
	}
	if path == "" && len(body) > 0 {
		if len(body) > config.MaxFile {
			return nil, fmt.Errorf("options: the configuration has %d bytes, more than %d", len(body), config.MaxFile)
		}
		if err := c.Decode("options", body); err != nil {
			return nil, err
		}
	}
	if err := c.Validate(); err != nil {
		return nil, err
	}
	s.config = c
	if s.root, err = storeRoot(c.Root, base, namespace); err != nil {
		return nil, err
	}
	return s, nil
}

// knownOptions says whether options are of a type that loadSettings reads.
func knownOptions(o *anypb.Any) bool {
	return o.GetTypeUrl() == typeURL(&runtimeoptions.Options{}) || o.GetTypeUrl() == typeURL(&runcoptions.Options{})
}

// storeRoot is where the records of a containerd namespace's containers are. It
// is not below the command line's own root, whose directories are containers.
func storeRoot(root, base, namespace string) (string, error) {
	if err := state.ValidateID(namespace); err != nil {
		return "", fmt.Errorf("namespace: %w", err)
	}
	if base == "" {
		base = filepath.Clean(root) + "-containerd"
	}
	dir, err := filepath.Abs(filepath.Join(base, namespace))
	if err != nil {
		return "", fmt.Errorf("root: %w", err)
	}
	return dir, nil
}

// typeURL is the name under which containerd packs a message.
func typeURL(m proto.Message) string { return string(m.ProtoReflect().Descriptor().FullName()) }
