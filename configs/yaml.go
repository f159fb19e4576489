package configs

import (
	"bytes"
	"fmt"
	"net/netip"
	"reflect"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// YAML returns the configuration in force, in the form of the file, with every
// key. There is no secret in it: keys and tokens stand in files, and only their
// paths are here. Loading it again gives the same configuration.
func (c *Config) YAML() ([]byte, error) {
	var b bytes.Buffer
	encoder := yaml.NewEncoder(&b)
	encoder.SetIndent(2)
	if err := encoder.Encode(encode(reflect.ValueOf(*c), schema())); err != nil {
		return nil, fmt.Errorf("write the configuration as YAML: %w", err)
	}
	if err := encoder.Close(); err != nil {
		return nil, fmt.Errorf("write the configuration as YAML: %w", err)
	}
	return b.Bytes(), nil
}

// encode makes a YAML tree of a value, keys in the order of the struct.
func encode(v reflect.Value, k *key) *yaml.Node {
	switch {
	case k.isSection():
		n := &yaml.Node{Kind: yaml.MappingNode, Tag: "!!map"}
		for i, f := range k.fields {
			n.Content = append(n.Content, scalar("!!str", f.name), encode(v.Field(i), f))
		}
		return n
	case k.isList():
		n := &yaml.Node{Kind: yaml.SequenceNode, Tag: "!!seq"}
		for i := range v.Len() {
			n.Content = append(n.Content, encode(v.Index(i), k.item))
		}
		if v.Len() == 0 {
			n.Style = yaml.FlowStyle
		}
		return n
	}
	switch value := v.Interface().(type) {
	case time.Duration:
		return scalar("!!str", formatDuration(value))
	case netip.Prefix:
		return scalar("!!str", value.String())
	}
	switch v.Kind() {
	case reflect.Bool:
		return scalar("!!bool", strconv.FormatBool(v.Bool()))
	case reflect.Int, reflect.Int64:
		return scalar("!!int", strconv.FormatInt(v.Int(), 10))
	case reflect.Float64:
		number := formatNumber(v.Float())
		if strings.Trim(number, "-0123456789") == "" {
			return scalar("!!int", number) // or it would be written with its tag
		}
		return scalar("!!float", number)
	default:
		return text(v.String())
	}
}

func scalar(tag, value string) *yaml.Node {
	return &yaml.Node{Kind: yaml.ScalarNode, Tag: tag, Value: value}
}

// text quotes what a reader could take for punctuation, as ":6443".
func text(value string) *yaml.Node {
	n := scalar("!!str", value)
	if value == "" || strings.HasPrefix(value, ":") {
		n.Style = yaml.DoubleQuotedStyle
	}
	return n
}
