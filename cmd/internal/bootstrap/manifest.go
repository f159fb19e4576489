package bootstrap

import (
	"errors"
	"fmt"
	"strings"

	"go.yaml.in/yaml/v3"
)

// flags are the flags of a command line, without their dashes. One without a value has "true".
// One that stands twice has both values, as lists of kube-apiserver's add up; for what is no
// list, the last is meant.
type flags map[string]string

// last returns the value of a flag that takes one.
func (f flags) last(name string) string {
	return f[name][strings.LastIndexByte(f[name], ',')+1:]
}

// list returns the values of a flag that takes several.
func (f flags) list(name string) []string {
	var out []string
	for _, v := range strings.Split(f[name], ",") {
		if v = strings.TrimSpace(v); v != "" {
			out = append(out, v)
		}
	}
	return out
}

// readManifest returns the flags of the kube-apiserver in a manifest of a static pod.
func readManifest(text []byte) (flags, error) {
	var pod struct {
		Kind string `yaml:"kind"`
		Spec struct {
			Containers []struct {
				Command []string `yaml:"command"`
				Args    []string `yaml:"args"`
			} `yaml:"containers"`
		} `yaml:"spec"`
	}
	if err := yaml.Unmarshal(text, &pod); err != nil {
		return nil, err
	}
	if pod.Kind != "Pod" {
		return nil, fmt.Errorf("kind: %q: this is no manifest of a static pod", pod.Kind)
	}
	for _, c := range pod.Spec.Containers {
		words := append(c.Command[:len(c.Command):len(c.Command)], c.Args...)
		for i, w := range words {
			if w == "kube-apiserver" || strings.HasSuffix(w, "/kube-apiserver") {
				return parseFlags(words[i+1:]), nil
			}
		}
	}
	return nil, errors.New("no container runs kube-apiserver")
}

// parseFlags reads --name=value, --name value and --name.
func parseFlags(words []string) flags {
	f := flags{}
	for i := 0; i < len(words); i++ {
		name, ok := strings.CutPrefix(words[i], "--")
		if !ok || name == "" {
			continue
		}
		value := "true"
		if n, v, found := strings.Cut(name, "="); found {
			name, value = n, v
		} else if i+1 < len(words) && !strings.HasPrefix(words[i+1], "-") {
			i++
			value = words[i]
		}
		if before := f[name]; before != "" {
			value = before + "," + value
		}
		f[name] = value
	}
	return f
}
